//! Cases that are to be batch invariant: short and long sequences side by side, in every layout, with each
//! option. The suite compares each sequence with the same one alone and in other layouts.

use attention_core::Role;

use super::case::Edit;
use super::packed::{OPTIONS, everything, of_lengths};
use super::{Case, KeyRows, Layout, Layouts, Sequences, Values};

/// How the sequences of the call itself lie.
const LAYOUTS: [(&str, Option<Sequences>); 3] = [
    ("padded", None),
    ("packed", Some(Sequences::PACKED)),
    (
        "paged",
        Some(Sequences {
            query_tail: Some(1),
            keys: KeyRows::Paged { page_size: 16, spare: 2, shared: 0, in_order: false },
        }),
    ),
];

/// A case of sequences of these lengths, as batch rows, with heads of this width.
fn of(name: &str, queries: &[usize], keys: &[usize], width: usize) -> Case {
    let mut case = of_lengths(format!("batch_invariant/{name}"), queries, keys);
    case.sequences = None;
    (case.dims.query_heads, case.dims.key_heads) = (2, 1);
    (case.dims.head_dim, case.dims.value_head_dim) = (width, width);
    case.options.batch_invariant = true;
    case
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |mut case: Case, layouts: &[(&str, Option<Sequences>)], edit: Edit| {
        let name = case.name.clone();
        edit(&mut case);
        for (layout, sequences) in layouts {
            cases.push(Case {
                name: format!("{name}-{layout}"),
                sequences: sequences.clone(),
                ..case.clone()
            });
        }
    };
    // Lengths beside which kernels choose other tiles, for few rows and for many.
    let (queries, keys) = ([70, 1, 5], [90, 33, 7]);
    for (index, (name, edit)) in OPTIONS.into_iter().chain([("everything", everything as Edit)]).enumerate() {
        add(of(name, &queries, &keys, 64), &LAYOUTS[index % 3..][..1], edit);
    }
    // Head dimensions of every tile; the last ones are for the forward pass.
    for width in [8, 64, 96, 128, 192, 256, 288] {
        add(of(&format!("width-{width}"), &queries, &keys, width), &LAYOUTS, |_| ());
    }
    add(of("value-dim", &queries, &keys, 64), &LAYOUTS[..1], |case| case.dims.value_head_dim = 37);
    // NaN that some rows of a tile must not see, so that these are computed again.
    add(of("nan-causal", &queries, &keys, 64), &LAYOUTS, |case| {
        case.options.causal = true;
        case.content.values = Values::NanInOneValue;
    });
    // Rows that are not aligned in one layout and are in another.
    add(of("inner-stride", &queries, &keys, 64), &LAYOUTS[..2], |case| {
        case.layouts = Layouts::everything(Layout::InnerStride);
    });

    // Decoding over many keys beside a short prefill: keys are cut, and other lengths ask for other cuts.
    let (queries, keys) = ([1, 300], [5000, 300]);
    for (name, edit) in [("long", (|_| ()) as Edit), ("long-bottom-right", OPTIONS[1].1)] {
        add(of(name, &queries, &keys, 64), &LAYOUTS, edit);
    }
    for (name, edit) in [
        ("long-window", (|case| case.options.window.left = Some(2500)) as Edit),
        ("long-sinks", OPTIONS[7].1),
        ("long-mask", OPTIONS[8].1),
        ("long-alibi", OPTIONS[4].1),
        ("long-everything", |case| {
            everything(case);
            case.options.window.left = Some(4000);
        }),
        ("long-nan", |case| {
            case.options.causal = true;
            case.options.query_offset = attention_core::QueryOffset::Fixed(2400);
            case.content.values = Values::NanInOneValue;
        }),
    ] {
        add(of(name, &queries, &keys, 64), &LAYOUTS[2..], edit);
    }
    // Heads that other kernels have, and lengths beside the places of cuts.
    for (width, last) in [(32, 40), (288, 60)] {
        add(of(&format!("long-width-{width}"), &[1, 2], &[2100, last], width), &LAYOUTS, |_| ());
    }
    add(of("long-edges", &[2, 1, 3, 1], &[2047, 2048, 2049, 4097], 16), &LAYOUTS[1..], OPTIONS[1].1);
    // So many heads that one block of a kernel on a GPU goes over all keys of a row, while blocks share them
    // where the sequence is alone. Narrow ones, since all of them are laid out anew for each layout.
    add(of("long-many-heads", &[1, 1], &[2100, 2060], 4), &LAYOUTS[2..], |case| {
        (case.dims.query_heads, case.dims.key_heads) = (135, 135);
        case.layouts = Layouts::default().with(Role::Out, Layout::Padded);
    });
    cases
}
