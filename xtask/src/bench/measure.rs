//! Times, taken in turn with a peer's.

use std::time::{Duration, Instant};

use attention_benches::{Plans, Workload};
use attention_core::ScratchBuffer;

use super::peer::Peer;
use crate::machine;

/// Calls of less than this are made several at a time, so that a turn is long against what switching costs.
const SHORT_MS: f64 = 20.0;
/// How long a turn of short calls takes, and how many calls it has at most.
const TURN_MS: f64 = 40.0;
const TURN_CALLS: f64 = 100.0;
/// Between turns of short calls: the threads of the other side may still spin (OpenMP's do for some
/// milliseconds).
const PAUSE: Duration = Duration::from_millis(20);
/// How many turns there are unless a number is asked for: as many as fit into the time, inside these bounds.
const TURNS: std::ops::RangeInclusive<usize> = 3..=15;
const TURNS_TIME: Duration = Duration::from_secs(8);

/// What came of one measurement.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Times {
    /// The median of our calls.
    pub(crate) median_ms: f64,
    /// The median of the peer's calls.
    pub(crate) peer_median_ms: Option<f64>,
    /// How much memory a call had in use beyond inputs and outputs, where that can be seen.
    pub(crate) peak_bytes: Option<u64>,
}

/// Runs a workload, and what the peer has prepared, in turn. A peer that fails is left out from there on,
/// with a sentence about it.
pub(crate) fn measure(
    workload: &mut Workload,
    plans: &Plans,
    mut peer: Option<&mut Peer>,
    turns: Option<usize>,
) -> crate::Result<Times> {
    let before = machine::resident();
    let resets = machine::reset_peak();
    let mut scratch = ScratchBuffer::new(plans.scratch_bytes());
    // The first call maps memory and starts threads; the second says how long one takes.
    workload.run(plans, &mut scratch)?;
    // Less than the scratch means that it came from memory which an earlier measurement had left mapped.
    let peak_bytes = (before.zip(machine::resident()))
        .map(|(before, after)| after.peak.saturating_sub(before.now))
        .filter(|&bytes| resets && bytes >= scratch.len() as u64);
    let mut time = |calls: usize| time_calls(workload, plans, &mut scratch, calls);
    let first = time(1)?[0];

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let start = Instant::now();
    let mut turn = 0;
    while match turns {
        Some(turns) => turn < turns.max(1),
        None => turn < *TURNS.start() || (turn < *TURNS.end() && start.elapsed() < TURNS_TIME),
    } {
        ours.extend(take_turn(first, &mut time)?);
        if let Some(running) = &mut peer {
            let name = running.name.clone();
            let mut time = |calls: usize| running.time(calls);
            // What the peer's calls take decides how many of them make a turn, as for ours.
            let first = theirs.first().copied().map_or_else(|| time(1).map(|times| times[0]), Ok);
            match first.and_then(|first| take_turn(first, &mut time)) {
                Ok(times) => theirs.extend(times),
                Err(reason) => {
                    eprintln!("peer {name} skipped: {reason}");
                    (peer, theirs) = (None, Vec::new());
                }
            }
        }
        turn += 1;
    }
    let peer_median_ms = (!theirs.is_empty()).then(|| median(&mut theirs));
    Ok(Times { median_ms: median(&mut ours), peer_median_ms, peak_bytes })
}

/// The milliseconds of each of some calls.
pub(super) fn time_calls(
    workload: &mut Workload,
    plans: &Plans,
    scratch: &mut ScratchBuffer,
    calls: usize,
) -> crate::Result<Vec<f64>> {
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let start = Instant::now();
        workload.run(plans, scratch)?;
        times.push(1e3 * start.elapsed().as_secs_f64());
    }
    Ok(times)
}

/// One side's turn: a single long call, or several short ones after a pause and one that does not count.
pub(super) fn take_turn<E>(
    call_ms: f64,
    time: &mut impl FnMut(usize) -> Result<Vec<f64>, E>,
) -> Result<Vec<f64>, E> {
    if call_ms >= SHORT_MS {
        return time(1);
    }
    std::thread::sleep(PAUSE);
    let calls = (TURN_MS / call_ms).clamp(2.0, TURN_CALLS) as usize;
    let mut times = time(1 + calls)?;
    times.remove(0);
    Ok(times)
}

/// The middle one, or the mean of the two middle ones.
pub(super) fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len().is_multiple_of(2) { 0.5 * (times[middle - 1] + times[middle]) } else { times[middle] }
}

#[cfg(test)]
mod tests {
    use attention_benches::{Mask, Work, parse_shape};
    use attention_core::DType;

    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_short_turn_has_a_call_that_does_not_count() {
        let mut asked = Vec::new();
        let mut time = |calls: usize| {
            asked.push(calls);
            Ok::<_, ()>((0..calls).map(|call| call as f64).collect())
        };
        assert_eq!(take_turn(10.0, &mut time), Ok(vec![1.0, 2.0, 3.0, 4.0]));
        assert_eq!(take_turn(500.0, &mut time), Ok(vec![0.0]));
        assert_eq!(asked, [5, 1]);
    }

    #[test]
    fn without_a_peer_there_are_times_of_ours_alone() {
        let dims = parse_shape("1,8,8,1,1,8").unwrap();
        let mut workload = Workload::new(dims, DType::F32, Work::Both, false, Mask::None).unwrap();
        let backend = crate::backends::named(&["cpu".to_owned()]).unwrap().remove(0);
        let plans = workload.plan(&*backend).unwrap();
        let times = measure(&mut workload, &plans, None, Some(2)).unwrap();
        assert!(times.median_ms > 0.0 && times.peer_median_ms.is_none());
    }
}
