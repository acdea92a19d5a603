#!/bin/sh
# Collectives between processes beside MPI's own: mpi-speed.sh [RANKS]. Needs mpicc and mpirun.
# All figures are the best of all repetitions, measured on rank 0; ours sum in the order of the ranks,
# whatever MPI does.
set -eu
cd "$(dirname "$0")/.."
ranks=${1:-4}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
cat >"$scratch/plain.c" <<'C'
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    for (int i = 0; i < 6; i++) {
        int bytes = 4 << (4 * i), n = bytes / 4, part = n / size ? n / size : 1;
        float *own = calloc(part * size + n, 4), *all = calloc(part * size + n, 4);
        double best[3] = {1e9, 1e9, 1e9};
        for (int k = 0; k < (bytes < 65536 ? 200 : 20); k++)
            for (int call = 0; call < 3; call++) {
                MPI_Barrier(MPI_COMM_WORLD);
                double start = MPI_Wtime();
                if (call == 0)
                    MPI_Allreduce(own, all, n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
                else if (call == 1)
                    MPI_Allgather(own, part, MPI_FLOAT, all, part, MPI_FLOAT, MPI_COMM_WORLD);
                else
                    MPI_Alltoall(own, part, MPI_FLOAT, all, part, MPI_FLOAT, MPI_COMM_WORLD);
                double took = MPI_Wtime() - start;
                if (took < best[call]) best[call] = took;
            }
        if (rank == 0)
            printf("%9d bytes  all_reduce %9.1f us  all_gather %9.1f us  all_to_all %9.1f us\n", bytes,
                   1e6 * best[0], 1e6 * best[1], 1e6 * best[2]);
        free(own), free(all);
    }
    MPI_Finalize();
}
C
mpicc -O2 -o "$scratch/plain" "$scratch/plain.c"
cargo build --quiet --workspace --example collectives
launch="mpirun --oversubscribe --bind-to none -n $ranks"
echo "MPI by itself, $ranks ranks"
$launch "$scratch/plain"
echo "meshweave"
$launch target/debug/examples/collectives
