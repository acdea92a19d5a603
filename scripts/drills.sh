#!/bin/sh
# Failures of ranks, rehearsed: drills.sh [COUNT [KINDS]] runs 8 processes COUNT times (50) for each kind of
# failure ("kill stop slow=60"), which befalls a random rank at a random instruction. Each time the job must
# end within the time-out and half a minute, name the rank, and go on from its checkpoint with the losses of
# the undisturbed run. SEED repeats a series; MESHWEAVE names another binary. Needs MPI.
set -eu
cd "$(dirname "$0")/.."
count=${1:-50} kinds=${2:-kill stop slow=60} seed=${SEED:-$$}
meshweave=${MESHWEAVE:-target/debug/meshweave} ranks=8 timeout=5
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cat >"$scratch/plan.weave" <<'WEAVE'
plan "drills" model m cluster "local:8"
train batch 8 seq 32 steps 9 optimizer adamw
data golden
init golden
model m = golden {
  size tiny
}
mesh main = dp:2 > tp:4
apply dp(dp)
apply megatron(tp)
apply zero(1, dp)
WEAVE
"$meshweave" compile "$scratch/plan.weave" --out "$scratch/plan" >"$scratch/log" 2>&1
# The least number of instructions of a rank.
instructions=$("$meshweave" --format json run "$scratch/plan" --steps 1 --trace "$scratch/trace" >/dev/null 2>&1 && grep -o '"instruction":[0-9]*' "$scratch/trace" | sort -t: -k2n | tail -1 | cut -d: -f2)
losses() { sed -n 's/.*"losses":\[\([^]]*\)\].*/\1/p' "$1"; }
run() { "$meshweave" --format json run "$scratch/plan" --backend mpi --checkpoint "$scratch/kept" --every 1 "$@"; }

run --steps 9 >"$scratch/whole" 2>/dev/null
whole=$(losses "$scratch/whole")
echo "seed $seed; $instructions instructions a step; undisturbed losses $whole"
failed=0 done=0 longest=0
for kind in $kinds; do
    named=0 resumed=0
    for turn in $(seq "$count"); do
        seed=$((seed + 1))
        set -- $(awk -v seed="$seed" -v ranks=$ranks -v n="$instructions" 'BEGIN { srand(seed); print int(rand() * ranks), 3 + int(rand() * 4), int(rand() * n) }')
        drill="$1:$2:$3:$kind"
        rm -rf "$scratch/kept"
        began=$(date +%s)
        code=0
        run --steps 9 --timeout $timeout --drill "$drill" >"$scratch/out" 2>"$scratch/err" || code=$?
        took=$(($(date +%s) - began))
        [ "$took" -gt "$longest" ] && longest=$took
        says=no
        case $kind in
        kill) grep -q "rank $1\b" "$scratch/err" && says=yes ;;
        *) grep -q "rank $1 gave no sign of life" "$scratch/out" && says=yes ;;
        esac
        run --steps 3 --resume "$scratch/kept" >"$scratch/again" 2>"$scratch/again.err" || true
        again=$(losses "$scratch/again") goes=no
        case ",$whole," in *",$again,"*) [ -n "$again" ] && goes=yes ;; esac
        done=$((done + 1))
        [ $says = yes ] && named=$((named + 1))
        [ $goes = yes ] && resumed=$((resumed + 1))
        if [ $code -eq 0 ] || [ $says = no ] || [ $goes = no ] || [ "$took" -gt $((timeout + 30)) ]; then
            failed=$((failed + 1))
            echo "FAILED $drill: exit code $code after $took s, named: $says, goes on: $goes ($again)"
            tail -c 1500 "$scratch/out" "$scratch/err" "$scratch/again.err"
        fi
    done
    echo "$kind: $named of $count named the rank, $resumed of $count went on with equal losses"
done
echo "$done drills, $failed failed; the longest took $longest s from start to end (measured)"
[ "$failed" -eq 0 ]
