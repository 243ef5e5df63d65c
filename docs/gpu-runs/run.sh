#!/usr/bin/env bash
# Runs what a page of this folder reports, on a machine with a GPU, cuDNN and NVRTC: the suite, the golden sets, calls with cuDNN
# hidden, the tests of tests/gpu.rs and compute-sanitizer, side by side; then the totals. Three minutes on 16 cores.
#
#     docs/gpu-runs/run.sh XTASK OUT [GPU_TESTS [CANDLE_TESTS]]
#
# XTASK is `target/release/xtask`, GPU_TESTS the executable of `cargo test --release -p attention-cudnn --test gpu --no-run`, and
# CANDLE_TESTS that of `cargo test --release -p attention-candle --features cuda --test candle --no-run`. Each log is a file in OUT.
# JOBS processes run at once, one for each core by default. It fails where anything failed.
#
# In the environment, each of which may be left out: DEVICE_TESTS, the executable of `cargo test --release -p attention-cudnn --test device
# --no-run`, whose tests run before anything else, alone, since one of them wants 50 GB; OLD_XTASK, that of an older commit, beside which
# the speed is measured at the end, in turns; ONLY=tests, ONLY=suite or ONLY=speed for that part alone.
set -euo pipefail

xtask=$1 out=$2 gpu_tests=${3:-} candle_tests=${4:-}
mkdir -p "$out"
# Kernels that the suite has compiled are those of attention-candle.
export ATTENTION_KERNEL_FOLDER=${ATTENTION_KERNEL_FOLDER:-${TMPDIR:-/tmp}/attention-kernels}
export xtask out gpu_tests candle_tests

# logged NAME COMMAND...: the command's output is the log of that name, with its exit status as the last line.
logged() {
    local log="$out/${1//\//_}.txt" status=0
    shift
    timeout 900 "$@" >"$log" 2>&1 || status=$?
    echo "exit status $status" >>"$log"
}
suite() { logged "suite.$1.$2.$3.$4" "$xtask" conformance --threads 1 --backend "$1" --dtype "$2" --pass "$3" --filter "$4"; }
hidden() { ATTENTION_CUDNN=/nonexistent logged "hidden.auto-cuda.$1.$2.$3" "$xtask" conformance --threads 1 --backend auto-cuda --dtype "$1" --pass "$2" --filter "$3"; }
golden() { logged "golden.$1.$2" "$xtask" golden --backend "$1" --dtype "$2"; }
sanitized() { logged "$1.$2.$3.$4.$5" compute-sanitizer --tool "$1" --error-exitcode 9 "$xtask" conformance --threads 1 --backend "$2" --dtype "$3" --pass "$4" --filter "$5"; }
device_test() { logged "tests.device.$1" "$DEVICE_TESTS" --ignored --test-threads 1 --nocapture --exact "$1"; }
gpu() { logged "tests.gpu" "$gpu_tests" --ignored --test-threads 1; }
candle() { ATTENTION_CANDLE_CUDA=1 ATTENTION_CANDLE_CASES=$2 logged "candle.$1.$2" "$candle_tests" "conformance::$1" --nocapture; }
candle_others() { ATTENTION_CANDLE_CUDA=1 logged "tests.candle" "$candle_tests" --skip conformance --test-threads 2; }
export -f logged suite hidden golden sanitized gpu candle candle_others

only=${ONLY:-all}
if [[ -n ${DEVICE_TESTS:-} && $only != suite && $only != speed ]]; then
    for name in tensors_of_another_stream_are_refused causal_prompts_whose_keys_are_split logits_of_every_magnitude \
        more_batch_rows_or_heads_than_65535 offsets_beyond_2_to_the_31_elements; do
        device_test "$name"
        printf '%-45s %s\n' "$name" "$(grep -E '^(test result|exit status)' "$out/tests.device.$name.txt" | tr '\n' ' ')"
    done
fi

families="layout values random position pair tile large bias mask groups small lengths head-dim value-head-dim end-to-end dropout
    results scale softcap alibi sinks magnitude bits"
{
    for family in $families; do
        for pass in backward forward; do
            for dtype in f64 f32 f16 bf16; do echo "suite chunked-cuda $dtype $pass $family/"; done
            for dtype in f16 bf16; do echo "suite cudnn $dtype $pass $family/"; done
        done
    done
    if [[ -n $gpu_tests ]]; then echo gpu; fi
    if command -v compute-sanitizer >/dev/null; then
        for pass in forward backward; do
            echo "sanitized memcheck cudnn bf16 $pass values/nan"
            echo "sanitized memcheck chunked-cuda f32 $pass large/"
            # cuDNN's own kernels are not free of what racecheck calls a hazard.
            echo "sanitized racecheck chunked-cuda f32 $pass large/"
        done
    fi
    for dtype in f64 f32 f16 bf16; do echo "golden chunked-cuda $dtype"; done
    for dtype in f16 bf16; do echo "golden cudnn $dtype"; done
    for pass in forward backward; do
        for family in small end-to-end values; do
            echo "suite auto-cuda bf16 $pass $family/"
            for dtype in f32 bf16; do echo "hidden $dtype $pass $family/"; done
        done
        for family in tile large values mask end-to-end; do
            echo "suite chunked-cuda-without-split-f32 f32 $pass $family/"
            echo "suite chunked-cuda-without-warpgroups bf16 $pass $family/"
        done
    done
    if [[ -n $candle_tests ]]; then
        echo candle_others
        for family in $families; do
            echo "candle heads_before_the_sequence $family/"
            echo "candle the_sequence_before_heads $family/"
        done
        echo "candle with_the_forward_pass_recomputed random/"
    fi
} >"$out/jobs"
case $only in
    tests) grep -x 'gpu' "$out/jobs" >"$out/jobs.tests" || true; mv "$out/jobs.tests" "$out/jobs" ;;
    speed) : >"$out/jobs" ;;
esac
xargs -a "$out/jobs" -P "${JOBS:-$(nproc)}" -I{} bash -c '{}'

# Totals by what stands before the family in a log's name. Filters find cases of other families too, so that some count twice.
awk '
    FNR == 1 {
        group = FILENAME
        sub(/.*\//, "", group)
        sub(/\.txt$/, "", group)
        if (group !~ /^(tests|golden)\./) sub(/\.[^.]*$/, "", group)
    }
    # One test of attention-candle is a whole suite.
    group ~ /^candle/ && /^test result/ { next }
    match($0, /[0-9]+ passed[,;] [0-9]+ failed[,;] [0-9]+ (skipped|ignored)/) {
        split(substr($0, RSTART), word, /[^0-9]+/)
        passed[group] += word[1]; failed[group] += word[2]; skipped[group] += word[3]
    }
    /SUMMARY:/ { said[group] = said[group] "  " $0 }
    /^exit status/ { logs[group]++; if ($3 != 0) bad[group] = bad[group] " " FILENAME }
    END {
        for (group in logs)
            printf "%-55s %6d passed, %d failed, %d skipped%s%s\n", group, passed[group], failed[group], skipped[group], said[group],
                bad[group] == "" ? "" : "  FAILED:" bad[group]
    }' "$out"/*.txt | sort
# Forward and backward of both, in turns on a device that does nothing else: the ratio of the medians is old time by new time.
if [[ -n ${OLD_XTASK:-} && $only != suite && $only != tests ]]; then
    for turn in 1 2 3; do
        for which in old new; do
            program=$xtask
            if [[ $which == old ]]; then program=$OLD_XTASK; fi
            logged "speed.$which.$turn" "$program" bench --suite gpu --repeats 1 --json "$out/speed.$which.$turn.json"
        done
    done
fi
! grep -lE '^exit status [^0]' "$out"/*.txt >/dev/null
