//! What `tracing` sees of a call.
//!
//! In a binary of its own: tests on other threads, which have no subscriber, can switch events off for all.

#![allow(missing_docs)]

#[path = "../facade/support.rs"]
#[allow(dead_code, reason = "shared with the tests that need all of it")]
mod support;

use std::io::Write;
use std::sync::{Arc, Mutex};

use attention::{Attention, DeviceKind, QueryOffset, Registry, Tensor};

use support::{Planning, Toy, registry};

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What `tracing` writes of a causal forward call of two queries on two keys with this registry.
fn traced(registry: &Registry) -> String {
    let x = Tensor::zeros::<f32>([1, 2, 2, 4]).unwrap();
    traced_call(|| {
        Attention::new().registry(registry).causal(true).forward(&x, &x, &x).unwrap();
    })
}

/// What `tracing` writes of a call.
fn traced_call(call: impl FnOnce()) -> String {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
        .with_span_events(tracing_subscriber::fmt::format::FmtSpan::CLOSE)
        .with_ansi(false)
        .without_time()
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, call);
    let bytes = lines.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

/// One test: events are switched on and off for the whole process.
#[test]
fn a_call_is_a_span_and_its_choice_an_event() {
    let text = traced(&registry([
        Toy::new("gpu").device(DeviceKind::Cuda).arc(),
        Toy::new("toy").scratch(64).arc(),
    ]));
    let lines: Vec<_> = text.lines().collect();
    let span = "attention{problem=forward f32 B1 T2 S2 N2 K2 H4 on cpu, causal";
    assert_eq!(lines.len(), 3, "{text}");
    assert!(
        lines[0].contains(span) && lines[0].contains("refused reason=gpu works on cuda memory"),
        "{text}"
    );
    assert!(
        lines[1].contains(
            "chosen backend=\"toy\" version=\"1.2.3\" numerics=F32 scratch_bytes=64 reason=the first"
        ),
        "{text}"
    );
    assert!(lines[2].contains("backend=\"toy\"}") && lines[2].contains("close"), "{text}");

    let text = traced(&registry([Toy::new("picky").planning(Planning::Fails).arc(), Toy::new("toy").arc()]));
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].contains("WARN") && lines[0].contains(span), "{text}");
    assert!(
        lines[0]
            .contains("failed to plan backend=\"picky\" reason=picky failed in building a plan: no engine"),
        "{text}"
    );
    assert!(lines[1].contains("chosen backend=\"toy\""), "{text}");

    // A decoder that forgot its offset: loud at first, then not a line a layer and step.
    let toy = registry([Toy::new("toy").arc()]);
    let query = Tensor::zeros::<f32>([1, 1, 2, 4]).unwrap();
    let decode = |offset, keys: usize| {
        let keys = Tensor::zeros::<f32>([1, keys, 2, 4]).unwrap();
        let call = Attention::new().registry(&toy).causal(true).query_offset(offset);
        traced_call(|| drop(call.forward(&query, &keys, &keys).unwrap()))
    };
    let said = "hides the last 11 keys from every query row";
    assert!(!decode(QueryOffset::BottomRight, 12).contains("hides"));
    let text = decode(QueryOffset::TOP_LEFT, 12);
    let line = text.lines().find(|line| line.contains(said)).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("WARN") && line.contains("QueryOffset::Fixed"), "{line}");
    // The next call is of the same plan, which was told of.
    let text = decode(QueryOffset::TOP_LEFT, 12);
    assert!(!text.contains(said) && !text.contains("chosen") && text.contains("backend=\"toy\""), "{text}");
    let (text, said) = (decode(QueryOffset::TOP_LEFT, 13), "hides the last 12 keys from every query row");
    assert!(text.lines().any(|line| line.contains("DEBUG") && line.contains(said)), "{text}");
    assert!(!text.contains("WARN"), "{text}");

    // By its lengths, each call says it of itself, whatever was planned.
    let keys = Tensor::zeros::<f32>([1, 14, 2, 4]).unwrap();
    let fill = |filled: usize| {
        let call = Attention::new().registry(&toy).causal(true).key_value_lengths([filled]);
        traced_call(|| drop(call.forward(&query, &keys, &keys).unwrap()))
    };
    assert!(!fill(1).contains("hides"));
    assert!(fill(3).contains("hides the last 2 keys from every query row"));
    assert!(fill(4).contains("hides the last 3 keys from every query row"));
}
