#!/bin/sh
# Collectives between processes beside MPI's own: mpi-speed.sh [RANKS [REPEATS]]. Needs mpicc and mpirun.
# All figures are medians, measured on rank 0; ours sum in the order of the ranks, whatever MPI does.
set -eu
cd "$(dirname "$0")/.."
ranks=${1:-4} repeats=${2:-50}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
cat >"$scratch/plain.c" <<'C'
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, size, repeats = atoi(argv[1]);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    int sizes[] = {4 << 10, 64 << 10, 1 << 20, 4 << 20};
    double *took = malloc(repeats * sizeof *took);
    for (int s = 0; s < 4; s++) {
        int n = sizes[s] / 4;
        float *own = malloc(4 * n), *all = malloc(4 * n);
        for (int i = 0; i < n; i++) own[i] = 1;
        for (int gather = 0; gather < 2; gather++) {
            for (int k = 0; k < repeats; k++) {
                MPI_Barrier(MPI_COMM_WORLD);
                double start = MPI_Wtime();
                if (gather)
                    MPI_Allgather(own, n / size, MPI_FLOAT, all, n / size, MPI_FLOAT, MPI_COMM_WORLD);
                else
                    MPI_Allreduce(own, all, n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
                took[k] = MPI_Wtime() - start;
            }
            qsort(took, repeats, sizeof *took, by_size);
            if (rank == 0)
                printf("%-15s %8d KiB %10.1f us\n", gather ? "MPI_Allgather" : "MPI_Allreduce", sizes[s] >> 10, 1e6 * took[repeats / 2]);
        }
        free(own), free(all);
    }
    MPI_Finalize();
}
C
mpicc -O2 -o "$scratch/plain" "$scratch/plain.c"
cargo build --quiet --workspace --example mpi_speed

launch="mpirun --oversubscribe --bind-to none -n $ranks"
$launch "$scratch/plain" "$repeats"
$launch target/debug/examples/mpi_speed "$repeats"
