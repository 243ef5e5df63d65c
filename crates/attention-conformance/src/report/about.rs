//! Where, when and how a run was made.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Where, when and how a run was made, and what of the suite it left out: without these, results prove
/// little.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// When it started, UTC: `2026-03-21T14:05:09Z`.
    pub started: String,
    /// The processor's model, and how many threads it runs at once.
    pub machine: String,
    /// The operating system and the architecture.
    pub system: String,
    /// The device that the backend computes on, where that is not the processor and it was said.
    pub device: Option<String>,
    /// The command line.
    pub command: String,
    /// By what the run was filtered, one sentence for each filter; empty for a whole run.
    pub filters: Vec<String>,
}

impl About {
    /// A run of this process, from now on.
    pub(crate) fn here(device: Option<&str>, filters: Vec<String>) -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let arguments: Vec<String> =
            std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
        Self {
            started: utc(seconds),
            machine: format!("{}, {threads} threads", processor()),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            device: device.map(str::to_owned),
            command: arguments.join(" "),
            filters,
        }
    }

    /// Whether nothing was left out.
    pub fn is_whole(&self) -> bool {
        self.filters.is_empty()
    }

    /// What a reader wants to know, as names and values.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let filters = match self.is_whole() {
            true => "none: the whole suite".to_owned(),
            false => self.filters.join("; "),
        };
        let mut lines = vec![
            ("started", self.started.clone()),
            ("machine", self.machine.clone()),
            ("system", self.system.clone()),
            ("command", self.command.clone()),
            ("filters", filters),
        ];
        lines.extend(self.device.clone().map(|device| ("device", device)));
        lines
    }
}

/// The processor's model, where the system says so.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == "model name");
    model
        .map_or_else(|| format!("{} processor", std::env::consts::ARCH), |(_, model)| model.trim().to_owned())
}

/// Seconds since 1970 as a time of day (the date by Hinnant, "chrono-compatible low-level date algorithms",
/// `civil_from_days`).
fn utc(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, want) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400 + 3661, "2000-02-29T01:01:01Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(seconds), want);
        }
    }

    #[test]
    fn a_run_says_where_it_was_made() {
        let about = About::here(Some("a card"), vec!["names that contain 'causal'".to_owned()]);
        assert!(!about.is_whole() && about.started.ends_with('Z') && about.machine.contains(" threads"));
        let lines = about.lines();
        assert!(lines.contains(&("device", "a card".to_owned())));
        assert!(lines.iter().all(|(_, value)| !value.is_empty()), "{lines:?}");
    }
}
