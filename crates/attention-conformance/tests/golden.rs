//! The golden sets against a right backend.

mod support;

use attention_conformance::golden::{GoldenSet, own_sets};
use attention_core::DType;
use support::{Flaw, Naive};

#[test]
fn own_sets_pass() {
    let naive = Naive::new(Flaw::None);
    let mut dirs = own_sets();
    if let Ok(extra) = std::env::var("EXTRA") {
        dirs.extend(extra.split(':').map(Into::into));
    }
    for directory in dirs {
        let set = GoldenSet::open(&directory).unwrap();
        let report = set.run(&naive, &DType::FLOATS, None, |_| {});
        for failure in report.failures() {
            println!("{failure}");
        }
        for dtype in DType::FLOATS {
            let mut worst: Vec<_> = report
                .results
                .iter()
                .filter(|r| r.dtype == dtype)
                .filter_map(|r| Some((r.worst()?, r.to_string())))
                .collect();
            worst.sort_by(|a, b| b.0.total_cmp(&a.0));
            for (_, r) in worst.iter().take(4) {
                println!("  {r}");
            }
        }
        println!("{} {}", directory.display(), report.totals());
    }
}
