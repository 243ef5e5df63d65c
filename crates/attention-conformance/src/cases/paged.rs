//! Cases about keys and values in pages. They have no backward pass.

use attention_core::{DType, Dropout, Role};

use super::case::Edit;
use super::packed::{OPTIONS, everything, of_lengths, of_tiles};
use super::{Case, KeyRows, Layout, Layouts, Sequences, Values};

/// A case of dense queries and of keys in pages of this size.
fn in_pages(name: &str, page_size: usize, queries: &[usize], keys: &[usize]) -> Case {
    let mut case = of_lengths(format!("paged/{name}"), queries, keys);
    case.sequences = Some(Sequences::paged(page_size));
    if queries.iter().all(|&length| length == case.dims.query_length) {
        case.options.query_lengths = None;
    }
    case
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    lengths(&mut cases);
    places(&mut cases);
    options(&mut cases);
    cases
}

fn lengths(cases: &mut Vec<Case>) {
    for page_size in [1, 2, 13, 16, 64] {
        for (name, queries, keys) in [
            ("decode", &[1, 1, 1, 1], &[45, 1, 16, 0]),
            ("prefill", &[5, 0, 3, 4], &[26, 13, 64, 3]),
            ("edges", &[2, 2, 2, 2], &[page_size - 1, page_size, page_size + 1, 2 * page_size]),
        ] {
            let mut case = in_pages(&format!("{name}-{page_size}"), page_size, queries, keys);
            OPTIONS[1].1(&mut case);
            cases.push(case);
        }
    }
    // Long enough for keys to be cut into parts, one row each, and for f32 not to be computed in f64.
    let mut case = in_pages("decode-long", 16, &[1, 1], &[5000, 700]);
    (case.dims.query_heads, case.dims.key_heads) = (2, 1);
    cases.push(case);
    for (name, queries, keys) in [
        ("empty-keys", &[2, 2, 2][..], &[0, 0, 0][..]),
        ("empty-queries", &[0, 0, 0], &[3, 5, 0]),
        ("no-sequences", &[], &[]),
    ] {
        let mut case = in_pages(name, 4, queries, keys);
        case.options.sinks = true;
        cases.push(case);
    }
    let mut case = in_pages("no-pages", 4, &[2, 2], &[0, 0]);
    case.sequences = Some(Sequences {
        query_tail: None,
        keys: KeyRows::Paged { page_size: 4, spare: 0, shared: 0, in_order: true },
    });
    cases.push(case);
    // More logits than f32 is computed in f64 for.
    for (name, edit) in [("tiles", (|_| ()) as Edit), ("tiles-everything", everything)] {
        let mut case = in_pages(name, 16, &[70, 20], &[90, 66]);
        (case.dims.query_heads, case.dims.key_heads) = (2, 1);
        edit(&mut case);
        cases.push(case);
    }
    for (name, queries, keys) in [("long", [200, 130], [1300, 700]), ("large", [130, 140], [140, 130])] {
        cases.push(of_tiles(in_pages(name, 16, &queries, &keys)));
    }
    let mut case = in_pages("longest-of-the-table", 4, &[3, 2], &[9, 5]);
    case.dims.key_length = 16;
    cases.push(case);
}

/// Where pages and their slots are.
fn places(cases: &mut Vec<Case>) {
    let mut add = |name: &str, query_tail: Option<usize>, keys: KeyRows, edit: Edit| {
        let mut case = in_pages(name, 4, &[5, 0, 2], &[13, 9, 8]);
        case.sequences = Some(Sequences { query_tail, keys });
        edit(&mut case);
        cases.push(case);
    };
    let pages = |shared: usize, in_order: bool| KeyRows::Paged { page_size: 4, spare: 3, shared, in_order };
    add("in-order", None, pages(0, true), |_| ());
    add("shared-prefix", None, pages(2, false), OPTIONS[1].1);
    add("shared-all", None, pages(9, false), |_| ());
    add("shared-mask", None, pages(2, false), OPTIONS[8].1);
    add("packed-queries", Some(0), pages(0, false), |_| ());
    add("packed-queries-bottom-right", Some(3), pages(0, false), OPTIONS[1].1);
    add("packed-queries-shared", Some(3), pages(2, false), OPTIONS[1].1);
    add("packed-queries-everything", Some(3), pages(0, false), everything);
    add("packed-queries-decode", Some(2), pages(1, false), |case| {
        case.dims.query_length = 1;
        case.options.query_lengths = Some(vec![1; 3]);
    });
    for (name, layout) in [
        // [pages, K, page size, H] in memory.
        ("heads-first", Layout::Transposed),
        ("padded", Layout::Padded),
        ("inner-stride", Layout::InnerStride),
        ("reversed-pages", Layout::Reversed { axis: 0 }),
        ("reversed-slots", Layout::Reversed { axis: 1 }),
    ] {
        let mut case = in_pages(&format!("layout-{name}"), 4, &[2, 1, 2], &[13, 9, 8]);
        case.layouts = Layouts::default().with(Role::Key, layout).with(Role::Value, layout);
        cases.push(case);
    }
    for (dtype, layout) in
        DType::INTEGERS.into_iter().zip([Layout::Padded, Layout::InnerStride, Layout::Reversed { axis: 1 }])
    {
        let mut case = in_pages(&format!("table-{dtype}"), 4, &[2, 1, 2], &[13, 0, 8]);
        case.layouts = Layouts::default().with(Role::BlockTable, layout);
        super::laid_out::draw_dtype(&mut case, Role::BlockTable, dtype);
        cases.push(case);
    }
    let mut case = in_pages("value-dim-larger", 4, &[2, 1, 2], &[13, 0, 8]);
    case.dims.value_head_dim = 24;
    cases.push(case);
}

fn options(cases: &mut Vec<Case>) {
    for (index, (first, edit_first)) in OPTIONS.iter().enumerate().filter(|(_, (name, _))| *name != "d-lse") {
        let mut case = in_pages(first, 4, &[5, 0, 3], &[13, 3, 7]);
        edit_first(&mut case);
        cases.push(case);
        // Half of the pairs: packed sequences have them all.
        for (second, edit_second) in OPTIONS[index + 1..].iter().step_by(2) {
            if second.starts_with(first) || first.starts_with("bottom") && *second == "offsets" {
                continue;
            }
            let mut case = in_pages(&format!("{first}-{second}"), 2, &[3, 0, 2], &[4, 2, 7]);
            (case.dims.query_heads, case.dims.key_heads) = (2, 1);
            edit_first(&mut case);
            edit_second(&mut case);
            cases.push(case);
        }
    }
    let mut case = in_pages("dropout-bits", 4, &[5, 0, 3], &[13, 3, 7]);
    case.dims.value_head_dim = 13;
    case.options.dropout = Some(Dropout::new(0.5, 9));
    case.content.values = Values::Identity;
    cases.push(case);
    for (name, edit) in [("plain", (|_| ()) as Edit), OPTIONS[1], ("everything", everything)] {
        let mut case = in_pages(&format!("bits-{name}"), 4, &[5, 0, 3], &[13, 3, 7]);
        (case.dims.query_heads, case.dims.key_heads) = (2, 1);
        case.variations = true;
        edit(&mut case);
        cases.push(case);
    }
    // One row each, and pages that sequences share.
    let mut case = in_pages("bits-decode-shared", 4, &[1, 1, 1], &[13, 9, 8]);
    case.sequences = Some(Sequences {
        query_tail: None,
        keys: KeyRows::Paged { page_size: 4, spare: 3, shared: 2, in_order: false },
    });
    case.variations = true;
    cases.push(case);
}
