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
# --no-run`, whose tests run before anything else, alone, since one of them wants 48 GB; OLD_XTASK, that of an older commit, beside which
# the speed of chunked-cuda is measured at the end, in TURNS turns (2); MORE_TESTS, further executables of tests on a device, as those of
# attention-cudnn's tests/numbers.rs and attention-chunked-cuda's tests/gpu.rs; ONLY=tests, ONLY=suite or ONLY=speed for that part alone; PART=1/2,
# then PART=2/2 with the same OUT, for every second job where the time of a call is short. The whole suite also fails where a variant that a
# backend lists for this device was run by no job; of parts, the last one does.
set -euo pipefail

# The checkout that this script is of: binaries may have been built in another one.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export root

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
golden() { logged "golden.$1.$2" "$xtask" golden --dir "$root/crates/attention-conformance/golden/jax" --dir "$root/crates/attention-conformance/golden/extended" --dir "$root/crates/attention-conformance/golden/sequences" --backend "$1" --dtype "$2"; }
sanitized() { logged "$1.$2.$3.$4.$5" compute-sanitizer --tool "$1" --error-exitcode 9 "$xtask" conformance --threads 1 --backend "$2" --dtype "$3" --pass "$4" --filter "$5"; }
device_test() { logged "tests.device.$1" "$DEVICE_TESTS" --ignored --test-threads 1 --nocapture --exact "$1"; }
gpu() { logged "tests.gpu" "$gpu_tests" --ignored --test-threads 1; }
more() { logged "tests.$(basename "$1")" "$1" --ignored --test-threads 1; }
candle() { ATTENTION_CANDLE_CUDA=1 ATTENTION_CANDLE_CASES=$2 logged "candle.$1.$2" "$candle_tests" "conformance::$1" --nocapture; }
candle_others() { ATTENTION_CANDLE_CUDA=1 logged "tests.candle" "$candle_tests" --skip conformance --test-threads 2; }
export -f logged suite hidden golden sanitized gpu more candle candle_others

only=${ONLY:-all}
if [[ -n ${DEVICE_TESTS:-} && $only != suite && $only != speed ]]; then
    for name in tensors_of_another_stream_are_refused causal_prompts_whose_keys_are_split logits_of_every_magnitude \
        more_batch_rows_or_heads_than_65535 offsets_beyond_2_to_the_31_elements; do
        device_test "$name"
        printf '%-45s %s\n' "$name" "$(grep -E '^(test result|exit status)' "$out/tests.device.$name.txt" | tr '\n' ' ')"
    done
fi

families="layout values random position pair tile large bias mask groups small lengths head-dim value-head-dim end-to-end dropout
    results scale softcap alibi sinks magnitude bits choices packed paged eight_bit"
{
    for family in $families; do
        for pass in backward forward; do
            # Keys in pages, and those of 8 bits, have no backward pass.
            if [[ $family == paged || $family == eight_bit ]] && [[ $pass == backward ]]; then continue; fi
            for dtype in f64 f32 f16 bf16; do echo "suite chunked-cuda $dtype $pass $family/"; done
            # cuDNN is given none of 8 bits.
            if [[ $family == eight_bit ]]; then continue; fi
            for dtype in f16 bf16; do echo "suite cudnn $dtype $pass $family/"; done
        done
    done
    # Kernels of batch-invariant calls take seconds to compile, so forward is cut by the beginnings of names.
    for dtype in f64 f32 f16 bf16; do
        echo "suite chunked-cuda $dtype backward batch_invariant/"
        for part in a b c d e i m n o s v width-1 width-2 width-6 width-8 width-9 wind long-a long-b long-e long-m long-n long-p long-s \
            long-wid long-win; do
            echo "suite chunked-cuda $dtype forward batch_invariant/$part"
        done
    done
    if [[ -n $gpu_tests ]]; then echo gpu; fi
    for tests in ${MORE_TESTS:-}; do echo "more $tests"; done
    if command -v compute-sanitizer >/dev/null; then
        for pass in forward backward; do
            echo "sanitized memcheck cudnn bf16 $pass values/nan"
            echo "sanitized memcheck chunked-cuda f32 $pass large/"
            # cuDNN's own kernels are not free of what racecheck calls a hazard.
            echo "sanitized racecheck chunked-cuda f32 $pass large/"
            echo "sanitized memcheck chunked-cuda bf16 $pass packed/used"
        done
    fi
    if command -v compute-sanitizer >/dev/null; then
        echo "sanitized memcheck chunked-cuda bf16 forward paged/shared"
        echo "sanitized memcheck chunked-cuda bf16 forward eight_bit/paged-layout"
        echo "sanitized memcheck chunked-cuda bf16 forward eight_bit/f8e4m3-tiles"
        echo "sanitized racecheck chunked-cuda f32 forward eight_bit/f8e4m3-tiles"
        echo "sanitized racecheck chunked-cuda bf16 forward eight_bit/paged-long"
    fi
    for dtype in f64 f32 f16 bf16; do echo "golden chunked-cuda $dtype"; done
    for dtype in f16 bf16; do echo "golden cudnn $dtype"; done
    for pass in forward backward; do
        for family in small end-to-end values; do
            echo "suite auto-cuda bf16 $pass $family/"
            for dtype in f32 bf16; do echo "hidden $dtype $pass $family/"; done
        done
        # Of packed sequences, those with enough rows for every tile.
        for family in tile/ large/ values/ mask/ bias/ sinks/ magnitude/ head-dim/ choices/ end-to-end/ packed/l eight_bit/; do
            if [[ $family == eight_bit/ && $pass == backward ]]; then continue; fi
            echo "suite chunked-cuda-without-split-f32 f32 $pass $family"
            for dtype in f16 bf16; do echo "suite chunked-cuda-without-warpgroups $dtype $pass $family"; done
        done
    done
    for family in tile/ values/ mask/ bias/ sinks/ lengths/ head-dim/ dropout/ packed/ paged/ eight_bit/ batch_invariant/width; do
        for dtype in f16 bf16; do echo "suite chunked-cuda-in-one-block $dtype forward $family"; done
    done
    if [[ -n $candle_tests ]]; then
        echo candle_others
        # Packed and paged sequences have no tensors of candle's.
        for family in ${families% packed*}; do
            echo "candle heads_before_the_sequence $family/"
            echo "candle the_sequence_before_heads $family/"
        done
        echo "candle with_the_forward_pass_recomputed random/"
    fi
} >"$out/jobs"
if [[ -n ${PART:-} ]]; then
    awk -v part="${PART%/*}" -v parts="${PART#*/}" 'NR % parts == part % parts' "$out/jobs" >"$out/jobs.part"
    mv "$out/jobs.part" "$out/jobs"
fi
case $only in
    tests) grep -E '^(gpu|more .*)$' "$out/jobs" >"$out/jobs.tests" || true; mv "$out/jobs.tests" "$out/jobs" ;;
    speed) : >"$out/jobs" ;;
esac
xargs -a "$out/jobs" -P "${JOBS:-$(nproc)}" -I{} bash -c '{}'

# Totals by what stands before the family in a log's name. Filters find cases of other families too, so that some count twice.
if compgen -G "$out/*.txt" >/dev/null; then awk '
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
    }' "$out"/*.txt | sort; fi

# Each log says which variants of a backend its process has run; only all logs together say which were not. Variants of one name are the
# same kernels whatever the backend was told to leave out.
variants="$out/variants"
if [[ $only == all || $only == suite ]] && [[ -z ${PART:-} || ${PART%/*} == "${PART#*/}" ]]; then
    awk '
        BEGIN { FS = " *(│|┆) *" }
        /^Runs of each variant:/ { table = 1; next }
        /^└/ { table = 0 }
        table && $2 == "variant" { backend = $3; sub(/-without-.*/, "", backend); next }
        table && NF >= 3 && backend !~ /^auto/ && $3 != "-" { runs[backend ": " $2] += ($3 == "NOT RUN" ? 0 : $3) }
        END {
            for (name in runs) { all++; if (runs[name] == 0) { missing++; print "NOT RUN " name } }
            printf "%d variants, %d of them not run on this device\n", all, missing
            if (!all) print "NOT RUN: no log lists a variant"
        }' "$out"/suite.*.txt | sort >"$variants"
    cat "$variants"
fi

# Forward and backward of both, in turns on a device that does nothing else, after a turn of both side by side that compiles what they
# need, each in a folder of its own: old time by new time, of the medians of the turns.
if [[ -n ${OLD_XTASK:-} && $only != suite && $only != tests ]]; then
    bench() {
        local which=$1 name=$2 program=$xtask
        shift 2
        if [[ $which == old ]]; then program=$OLD_XTASK; fi
        ATTENTION_KERNEL_FOLDER="$ATTENTION_KERNEL_FOLDER-$which" logged "speed.$name.$which" "$program" bench --suite gpu \
            --backend chunked-cuda --record "$out/speed.$name.$which.csv" "$@"
    }
    for which in old new; do
        for dtype in f32 bf16; do bench "$which" "first-$dtype" --dtype "$dtype" --repeats 1 & done
    done
    wait
    for turn in $(seq "${TURNS:-2}"); do
        for which in old new; do bench "$which" "$turn" --repeats 2; done
    done
    awk '
        function median(list,    all, count, i, j, swap) {
            count = split(list, all, " ")
            for (i = 1; i <= count; ++i)
                for (j = i + 1; j <= count; ++j)
                    if (all[j] + 0 < all[i] + 0) { swap = all[i]; all[i] = all[j]; all[j] = swap }
            return (all[int((count + 1) / 2)] + all[int(count / 2) + 1]) / 2
        }
        BEGIN { FS = "," }
        FNR == 1 { which = FILENAME; sub(/.*speed\.[0-9]*\./, "", which); sub(/\.csv$/, "", which) }
        /^#/ || $1 == "b" { next }
        {
            row = sprintf("%s,%s,%s,%s,%s,%s %s %s%s%s", $1, $2, $3, $4, $5, $6, $7, $8, $9 == "true" ? " causal" : "", $10 == "plain" ? "" : " " $10)
            if (!(row in seen)) { seen[row] = 1; order[++rows] = row }
            times[which, row] = times[which, row] " " $12
        }
        END {
            printf "%-45s %10s %10s  old / new\n", "B,T,S,N,K,H", "old us", "new us"
            for (i = 1; i <= rows; ++i) {
                row = order[i]; old = median(times["old", row]); new = median(times["new", row])
                if (old == 0 || new == 0) { printf "%-45s measured on one side only\n", row; continue }
                printf "%-45s %10.1f %10.1f  %.3f%s\n", row, old, new, old / new, old / new < 0.98 ? "  SLOWER" : ""
                sum += log(old / new); ++count
            }
            if (count) printf "geometric mean %.3f of %d rows\n", exp(sum / count), count
        }' "$out"/speed.[0-9]*.csv
fi
failed=$(grep -lE '^exit status [^0]' "$out"/*.txt || true)
[[ -z $failed ]] && ! grep -qs '^NOT RUN' "$variants"
