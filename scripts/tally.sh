# shellcheck shell=bash
# Counts tests, for scripts/test and scripts/test-engines: `source scripts/tally.sh`, note what passes, fails and can't be
# run here, then `summary`. $tmp is a directory of the script's own, which goes when it ends. Rust tests (tests/common)
# note what they can't do here in the file $MIG_TEST_SKIPS, a line "SKIP: TEST: REASON" each.

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export MIG_TEST_SKIPS=$tmp/skips
touch "$MIG_TEST_SKIPS"

passed=0 failed=0 failures=()
pass() { passed=$((passed + 1)) && echo "test $1 ... ok"; }
fail() { failed=$((failed + 1)) && failures+=("$1") && echo "test $1 ... FAILED"; }
skip() { echo "SKIP: $1: $2" >>"$MIG_TEST_SKIPS" && echo "test $1 ... skipped: $2"; }

# Adds what test programs of cargo's said and ended with: count LOG STATUS [PREFIX for names]
count() {
    local log=$1 rc=$2 before=$failed line number
    while read -r line; do
        number=$(sed -n 's/.* \([0-9]*\) passed.*/\1/p' <<<"$line")
        passed=$((passed + number))
        number=$(sed -n 's/.* \([0-9]*\) failed.*/\1/p' <<<"$line")
        failed=$((failed + number))
    done < <(grep -E '^test result: ' "$log")
    while read -r line; do failures+=("${3:-}$line"); done < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$log")
    # Test programs that died before they could count.
    while read -r line; do fail "cargo test $line"; done < <(awk '
        / Running |^ *Doc-tests / { counted = 0 }
        /^test result: FAILED/ { counted = 1 }
        /^error: test failed, to rerun pass/ && !counted { sub(/.*pass `/, ""); sub(/`.*/, ""); print }' "$log")
    sed -n 's/^test \(.*\) \.\.\. ignored\(, \(.*\)\)\{0,1\}$/SKIP: \1: \3/p' "$log" | sed 's/: $/: ignored by default/' >>"$MIG_TEST_SKIPS"
    if [[ $rc -ne 0 && $failed -eq $before ]]; then fail "${3:-}the tests ended with status $rc"; fi
}

# Lists what was skipped and what failed; the last line is the count. Succeeds when nothing failed.
summary() {
    local skipped
    skipped=$(sort -u "$MIG_TEST_SKIPS" | grep -c .)
    echo
    if [[ $skipped -gt 0 ]]; then
        echo "Skipped on this machine:"
        sort -u "$MIG_TEST_SKIPS" | sed -n 's/^\(SKIP: *\)\{0,1\}\(..*\)/  \2/p'
        echo
    fi
    if [[ ${#failures[@]} -gt 0 ]]; then
        echo "Failed:"
        printf '  %s\n' "${failures[@]}"
        echo
    fi
    echo "$passed passed, $failed failed, $skipped skipped"
    [[ $failed -eq 0 ]]
}
