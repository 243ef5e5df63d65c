//! What the machine is, as far as a measurement depends on it.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

/// How many threads can run at once.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The processor's model, and how many cores of it there are.
pub(crate) fn description() -> String {
    let model = fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| field(&text, "model name"));
    let model = model.unwrap_or_else(|| format!("{} processor", std::env::consts::ARCH));
    format!("{model}, {} cores", cores())
}

/// The instruction set that kernels chosen at run time use here.
pub(crate) fn level() -> &'static str {
    attention_chunked::ChunkedBackend::new().level().map_or("none", attention_chunked::Level::name)
}

/// Bytes of memory that can still be had, where the system says so.
pub(crate) fn available_memory() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

/// Bytes of memory that this process has in use, and the most it ever had.
pub(crate) struct Resident {
    /// Now.
    pub(crate) now: u64,
    /// The most since the start, or since [`reset_peak`].
    pub(crate) peak: u64,
}

/// The memory of this process, where the system says so.
pub(crate) fn resident() -> Option<Resident> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    Some(Resident { now: kilobytes(&text, "VmRSS")?, peak: kilobytes(&text, "VmHWM")? })
}

/// Lets the peak of this process's memory start again from what is in use; whether the system can.
pub(crate) fn reset_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The value of a line `name : value`.
fn field(text: &str, name: &str) -> Option<String> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned()).next()
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let value = field(text, name)?;
    Some(1024 * value.strip_suffix("kB")?.trim().parse::<u64>().ok()?)
}

/// Today's date, UTC, as `2026-03-21`.
pub(crate) fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    date(seconds / 86_400)
}

/// The date that lies this many days after 1970-01-01 (Hinnant, "chrono-compatible low-level date
/// algorithms", `civil_from_days`).
fn date(days: u64) -> String {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (days, want) in [(0, "1970-01-01"), (11_016, "2000-02-29"), (20_453, "2025-12-31")] {
            assert_eq!(date(days), want);
        }
    }

    #[test]
    fn fields_are_read_with_their_unit() {
        let text = "VmHWM:\t    1200 kB\nVmRSS:\t 900 kB\nmodel name\t: A: B\n";
        assert_eq!(kilobytes(text, "VmRSS"), Some(900 * 1024));
        assert_eq!(kilobytes(text, "VmSwap"), None);
        assert_eq!(field(text, "model name").as_deref(), Some("A: B"));
    }
}
