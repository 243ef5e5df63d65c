//! Cases about options: each alone, in its variants, and every pair of two.

use attention_core::{DType, Dropout, Gradients, QueryOffset, Window};

use super::case::Edit;
use super::{AlibiShape, BiasContent, Broadcast, Case, MaskContent, Saved, Values, Wanted, dims};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    numbers(&mut cases);
    positions(&mut cases);
    offsets(&mut cases);
    lengths(&mut cases);
    masks(&mut cases);
    biases(&mut cases);
    sinks_and_slopes(&mut cases);
    dropout(&mut cases);
    results(&mut cases);
    values(&mut cases);
    pairs(&mut cases);
    cases
}

/// Adds a case on the usual sizes, grouped and with more keys than queries.
fn add(cases: &mut Vec<Case>, name: impl Into<String>, edit: impl FnOnce(&mut Case)) {
    let mut case = Case::new(name, dims([2, 9, 13, 4, 2, 16]));
    edit(&mut case);
    cases.push(case);
}

fn numbers(cases: &mut Vec<Case>) {
    for scale in [0.0, 1.0, -0.4, 1.75, 0.01] {
        add(cases, format!("scale/{scale}"), |case| case.options.scale = Some(scale));
        add(cases, format!("scale/{scale}-causal-bias"), |case| {
            case.options.scale = Some(scale);
            case.options.causal = true;
            case.options.bias = Some(Broadcast::FULL);
        });
    }
    for softcap in [0.5, 2.0, 30.0] {
        for factor in [1.0, 8.0] {
            add(cases, format!("softcap/{softcap}-queries-times-{factor}"), |case| {
                case.options.softcap = Some(softcap);
                case.content.values = Values::Amplified(factor);
            });
        }
        add(cases, format!("softcap/{softcap}-bias-mask"), |case| {
            case.options.softcap = Some(softcap);
            case.options.bias = Some(Broadcast::FULL);
            case.options.mask = Some(Broadcast::FULL);
        });
    }
}

fn positions(cases: &mut Vec<Case>) {
    let offsets = [
        QueryOffset::Fixed(0),
        QueryOffset::Fixed(3),
        QueryOffset::Fixed(-4),
        QueryOffset::Fixed(40),
        QueryOffset::Fixed(-40),
        QueryOffset::Fixed(i64::MAX),
        QueryOffset::Fixed(i64::MIN),
        QueryOffset::BottomRight,
    ];
    let windows = [
        ("causal", true, Window::UNBOUNDED),
        ("left", false, Window { left: Some(4), right: None }),
        ("right", false, Window { left: None, right: Some(2) }),
        ("both", false, Window::new(3, 1)),
        ("causal-left", true, Window { left: Some(5), right: None }),
        ("causal-both", true, Window::new(2, 2)),
        ("self", false, Window::new(0, 0)),
        ("wide", false, Window::new(usize::MAX, 1000)),
    ];
    for offset in offsets {
        for (name, causal, window) in windows {
            for (t, s) in [(9, 13), (13, 6)] {
                add(cases, format!("position/{offset}-{name}-t{t}-s{s}"), |case| {
                    (case.dims.query_length, case.dims.key_length) = (t, s);
                    case.options.query_offset = offset;
                    case.options.causal = causal;
                    case.options.window = window;
                });
            }
        }
        if !matches!(offset, QueryOffset::Fixed(i64::MAX | i64::MIN)) {
            add(cases, format!("position/{offset}-alibi"), |case| {
                case.options.query_offset = offset;
                case.options.alibi = Some(AlibiShape::Heads);
            });
        }
    }
}

/// Offsets that differ from batch row to batch row.
fn offsets(cases: &mut Vec<Case>) {
    let offsets = [
        ("near", [0, 3, -4]),
        ("alike", [2, 2, 2]),
        ("cached", [40, 1, 4]),
        ("far", [i64::MIN, i64::MAX, 5]),
        ("edge", [1 << 22, -(1 << 22), 1]),
    ];
    let edits: [(&str, Edit); 8] = [
        ("causal", |case| case.options.causal = true),
        ("left", |case| case.options.window.left = Some(4)),
        ("both", |case| case.options.window = Window::new(3, 1)),
        ("causal-left", |case| {
            case.options.causal = true;
            case.options.window.left = Some(5);
        }),
        ("causal-lengths", |case| {
            case.options.causal = true;
            case.options.query_lengths = Some(vec![9, 6, 8]);
            case.options.key_value_lengths = Some(vec![13, 7, 2]);
        }),
        ("decode", |case| {
            case.dims.query_length = 1;
            case.options.causal = true;
            case.options.key_value_lengths = Some(vec![5, 13, 9]);
        }),
        ("alibi", |case| case.options.alibi = Some(AlibiShape::Heads)),
        ("everything", |case| {
            case.options.causal = true;
            case.options.window.left = Some(6);
            case.options.mask = Some(Broadcast { rank: 4, full: [true, false, false, true] });
            case.options.bias = Some(Broadcast::FULL);
            case.options.sinks = true;
            case.options.d_lse = true;
            case.options.softcap = Some(2.0);
            case.options.dropout = Some(Dropout::new(0.2, 11));
            case.options.dropout_tensors = true;
        }),
    ];
    for (name, offsets) in offsets {
        for (option, edit) in edits {
            // Distances of far rows leave no digits of a logit.
            if option == "alibi" && matches!(name, "far" | "edge") {
                continue;
            }
            add(cases, format!("offsets/{name}-{option}"), |case| {
                case.dims.batch = 3;
                case.options.query_offsets = Some(offsets.to_vec());
                edit(case);
                case.variations = name == "near";
            });
        }
    }
    // More rows and keys than a tile has.
    add(cases, "offsets/tiles", |case| {
        case.dims = dims([2, 150, 170, 2, 2, 64]);
        case.options.causal = true;
        case.options.query_offsets = Some(vec![20, -30]);
    });
}

fn lengths(cases: &mut Vec<Case>) {
    type Lengths = Option<[usize; 3]>;
    let variants: [(&str, Lengths, Lengths); 7] = [
        ("queries", Some([9, 4, 1]), None),
        ("keys", None, Some([13, 6, 1])),
        ("both", Some([5, 9, 2]), Some([13, 7, 3])),
        ("zero-queries", Some([0, 9, 3]), None),
        ("zero-keys", None, Some([0, 13, 5])),
        ("zero-both", Some([0, 9, 4]), Some([13, 0, 0])),
        ("full", Some([9, 9, 9]), Some([13, 13, 13])),
    ];
    for (name, query, key_value) in variants {
        for (suffix, causal, offset) in [
            ("", false, QueryOffset::TOP_LEFT),
            ("-causal", true, QueryOffset::TOP_LEFT),
            ("-bottom-right", true, QueryOffset::BottomRight),
        ] {
            add(cases, format!("lengths/{name}{suffix}"), |case| {
                case.dims.batch = 3;
                case.options.query_lengths = query.map(Vec::from);
                case.options.key_value_lengths = key_value.map(Vec::from);
                case.options.causal = causal;
                case.options.query_offset = offset;
                case.options.d_lse = causal;
            });
        }
        add(cases, format!("lengths/{name}-bottom-right-window"), |case| {
            case.dims.batch = 3;
            case.options.query_lengths = query.map(Vec::from);
            case.options.key_value_lengths = key_value.map(Vec::from);
            case.options.query_offset = QueryOffset::BottomRight;
            case.options.window = Window::new(3, 1);
            case.options.bias = Some(Broadcast::FULL);
            case.options.sinks = true;
        });
    }
    // Batch rows without keys, or without queries, of one head a group: kernels that walk over tiles of keys
    // may leave their gradients unwritten.
    let sizes = [("", [3, 9, 13, 2, 2, 16]), ("-tiles", [3, 150, 170, 2, 2, 64])];
    for (suffix, size) in sizes {
        for (name, query, key_value, dropout) in [
            ("keys", None, [0, size[2], 5], false),
            ("keys-dropout", None, [0, size[2], 5], true),
            ("both", Some([0, size[1], 4]), [size[2], 0, 0], false),
        ] {
            add(cases, format!("lengths/one-head-zero-{name}{suffix}"), |case| {
                case.dims = dims(size);
                case.options.query_lengths = query.map(Vec::from);
                case.options.key_value_lengths = Some(key_value.to_vec());
                case.options.dropout = dropout.then(|| Dropout::new(0.3, 11));
            });
        }
    }
}

fn masks(cases: &mut Vec<Case>) {
    for pattern in Broadcast::all() {
        let name = format!("mask/rank{}-{}", pattern.rank, pattern.name());
        add(cases, name, |case| case.options.mask = Some(pattern));
    }
    for (name, content) in [
        ("sparse", MaskContent::Sparse),
        ("all-true", MaskContent::AllTrue),
        ("all-false", MaskContent::AllFalse),
        ("empty-rows", MaskContent::EmptyRows),
    ] {
        for sinks in [false, true] {
            add(cases, format!("mask/{name}{}", if sinks { "-sinks" } else { "" }), |case| {
                case.options.mask = Some(Broadcast { rank: 4, full: [true, false, true, true] });
                case.options.sinks = sinks;
                case.options.d_lse = true;
                case.content.mask = content;
            });
        }
    }
}

fn biases(cases: &mut Vec<Case>) {
    for (index, pattern) in Broadcast::all().into_iter().enumerate() {
        // The pattern with a dtype of its own, so that every dtype meets many patterns.
        let dtype = DType::FLOATS[index % 4];
        let name = format!("bias/rank{}-{}-{dtype}", pattern.rank, pattern.name());
        add(cases, name, |case| {
            case.options.bias = Some(pattern);
            case.options.bias_dtype = Some(dtype);
        });
    }
    for dtype in DType::FLOATS {
        add(cases, format!("bias/{dtype}-causal"), |case| {
            case.options.bias = Some(Broadcast { rank: 4, full: [false, true, true, true] });
            case.options.bias_dtype = Some(dtype);
            case.options.causal = true;
        });
    }
    for (name, content) in [
        ("negative-infinity", BiasContent::NegativeInfinity),
        ("negative-infinity-rows", BiasContent::NegativeInfinityRows),
        ("large-negative", BiasContent::LargeNegative),
    ] {
        for pattern in [
            Broadcast::FULL,
            Broadcast { rank: 2, full: [false, false, true, true] },
            Broadcast { rank: 4, full: [true, false, false, true] },
        ] {
            for sinks in [false, true] {
                let suffix = if sinks { "-sinks" } else { "" };
                add(cases, format!("bias/{name}-{}{suffix}", pattern.name()), |case| {
                    case.options.bias = Some(pattern);
                    case.options.sinks = sinks;
                    case.options.d_lse = true;
                    case.content.bias = content;
                });
            }
        }
    }
}

fn sinks_and_slopes(cases: &mut Vec<Case>) {
    for dtype in DType::FLOATS {
        add(cases, format!("sinks/{dtype}"), |case| {
            case.options.sinks = true;
            case.options.bias_dtype = Some(dtype);
        });
        for (name, shape) in [("heads", AlibiShape::Heads), ("batch-heads", AlibiShape::BatchHeads)] {
            add(cases, format!("alibi/{name}-{dtype}"), |case| {
                case.options.alibi = Some(shape);
                case.options.bias_dtype = Some(dtype);
                case.options.causal = dtype == DType::F32;
            });
        }
    }
    add(cases, "sinks/d-lse", |case| {
        case.options.sinks = true;
        case.options.d_lse = true;
    });
    add(cases, "sinks/padded-rows", |case| {
        case.options.sinks = true;
        case.options.d_lse = true;
        case.options.query_lengths = Some(vec![9, 3]);
    });
    add(cases, "sinks/without-keys", |case| {
        case.dims.key_length = 0;
        case.options.sinks = true;
        case.options.d_lse = true;
    });
}

fn dropout(cases: &mut Vec<Case>) {
    for rate in [0.0, 0.1, 0.5, 0.9, 1.0 - 1.0 / 65536.0] {
        add(cases, format!("dropout/{rate}"), |case| case.options.dropout = Some(Dropout::new(rate, 42)));
        add(cases, format!("dropout/{rate}-everything"), |case| {
            case.options.dropout = Some(Dropout::new(rate, u64::MAX - 5).with_offset(u32::MAX));
            case.options.causal = true;
            case.options.query_offset = QueryOffset::Fixed(2);
            case.options.mask = Some(Broadcast::FULL);
            case.options.bias = Some(Broadcast::FULL);
            case.options.sinks = true;
            case.options.d_lse = true;
        });
    }
    // Seeds that every integer has, that only wide ones have, and that are negative.
    for (name, seed, offset) in [("small", 42, 7), ("wide", 1 << 40, u32::MAX), ("negative", u64::MAX - 5, 3)]
    {
        for rate in [0.1, 0.5] {
            add(cases, format!("dropout/tensors-{name}-{rate}"), |case| {
                case.options.dropout = Some(Dropout::new(rate, seed).with_offset(offset));
                case.options.dropout_tensors = true;
            });
        }
        add(cases, format!("dropout/bits-tensors-{name}"), |case| {
            case.dims.value_head_dim = case.dims.key_length;
            case.options.dropout = Some(Dropout::new(0.5, seed).with_offset(offset));
            case.options.dropout_tensors = true;
            case.content.values = Values::Identity;
        });
    }
    // The output is the row of probabilities, so the bits can be read off it.
    for (s, seed, offset) in [(1, 0, 0), (8, 1, 0), (13, 1 << 40, 3), (33, 7, 9), (130, 99, u32::MAX)] {
        add(cases, format!("dropout/bits-s{s}"), |case| {
            case.dims.key_length = s;
            case.dims.value_head_dim = s;
            case.options.dropout = Some(Dropout::new(0.5, seed).with_offset(offset));
            case.content.values = Values::Identity;
        });
    }
}

fn results(cases: &mut Vec<Case>) {
    add(cases, "results/lse", |case| case.options.lse = Wanted::Always);
    add(cases, "results/no-lse", |case| case.options.lse = Wanted::Never);
    add(cases, "results/d-lse", |case| case.options.d_lse = true);
    add(cases, "results/deterministic", |case| case.options.deterministic = true);
    let single = [("dq", Gradients::QUERY), ("dk", Gradients::KEY), ("dv", Gradients::VALUE)];
    for bits in 1..8usize {
        let chosen: Vec<_> =
            (0..3).filter(|index| bits >> index & 1 == 1).map(|index| single[index]).collect();
        let names: Vec<_> = chosen.iter().map(|(name, _)| *name).collect();
        add(cases, format!("results/{}", names.join("-")), |case| {
            case.options.gradients =
                chosen.iter().fold(Gradients::NONE, |all, &(_, gradient)| all | gradient);
            case.options.bias = Some(Broadcast::FULL);
            case.options.sinks = true;
            case.options.dbias = Wanted::Never;
            case.options.dsinks = Wanted::Never;
            case.options.causal = bits == 7;
        });
    }
    add(cases, "results/dbias-alone", |case| {
        case.options.bias = Some(Broadcast { rank: 2, full: [false, false, true, true] });
        case.options.dbias = Wanted::Always;
        case.options.gradients = Gradients::NONE;
    });
    add(cases, "results/dsinks-alone", |case| {
        case.options.sinks = true;
        case.options.dsinks = Wanted::Always;
        case.options.gradients = Gradients::NONE;
    });
}

fn values(cases: &mut Vec<Case>) {
    for factor in [4.0, 16.0, 64.0] {
        add(cases, format!("values/queries-times-{factor}"), |case| {
            case.content.values = Values::Amplified(factor);
        });
    }
    for factor in [64.0, 0.015625] {
        add(cases, format!("values/scaled-by-{factor}"), |case| case.content.values = Values::Scaled(factor));
    }
    for (name, causal) in [("values/nan-in-one-query", false), ("values/nan-in-one-query-causal", true)] {
        add(cases, name, |case| {
            case.content.values = Values::NanInOneQuery;
            case.options.causal = causal;
        });
    }
    add(cases, "values/nan-in-an-empty-row", |case| {
        case.content.values = Values::NanInOneQuery;
        case.options.causal = true;
        case.options.query_offset = QueryOffset::Fixed(-2);
    });
    // Seen by some rows and not by others, some of which are beside them in a tile.
    let parts: [(&str, Edit); 5] = [
        ("causal", |case| case.options.causal = true),
        ("window", |case| case.options.window = Window { left: Some(3), right: Some(2) }),
        ("mask", |case| case.options.mask = Some(Broadcast::FULL)),
        ("bias", |case| {
            case.options.bias = Some(Broadcast::FULL);
            case.content.bias = BiasContent::NegativeInfinity;
        }),
        ("causal-lengths", |case| {
            case.options.causal = true;
            case.options.query_lengths = Some(vec![9, 5]);
            case.options.key_value_lengths = Some(vec![10, 6]);
        }),
    ];
    for (name, values) in
        [("query", Values::NanInOneQuery), ("key", Values::NanInOneKey), ("value", Values::NanInOneValue)]
    {
        for (part, edit) in parts {
            add(cases, format!("values/nan-in-one-{name}-{part}-grouped"), |case| {
                case.content.values = values;
                edit(case);
            });
            add(cases, format!("values/nan-in-one-{name}-{part}-tiles"), |case| {
                case.dims = dims([2, 150, 170, 2, 2, 64]);
                case.content.values = values;
                edit(case);
            });
        }
    }
    for garbage in [false, true] {
        let name = if garbage { "values/garbage" } else { "values/clean" };
        add(cases, name, |case| {
            case.options.causal = true;
            case.options.query_lengths = Some(vec![9, 5]);
            case.options.key_value_lengths = Some(vec![10, 6]);
            case.options.mask = Some(Broadcast { rank: 1, full: [false, false, false, true] });
            case.content.garbage = garbage;
        });
    }
}

/// Options to be combined two by two.
const OPTIONS: [(&str, Edit); 14] = [
    ("causal", |case| case.options.causal = true),
    ("offset", |case| case.options.query_offset = QueryOffset::Fixed(3)),
    ("bottom-right", |case| case.options.query_offset = QueryOffset::BottomRight),
    ("window-left", |case| case.options.window.left = Some(4)),
    ("window-right", |case| case.options.window.right = Some(2)),
    ("mask", |case| case.options.mask = Some(Broadcast { rank: 4, full: [true, true, true, true] })),
    ("bias", |case| case.options.bias = Some(Broadcast { rank: 3, full: [false, true, true, true] })),
    ("query-lengths", |case| case.options.query_lengths = Some(vec![9, 6])),
    ("key-lengths", |case| case.options.key_value_lengths = Some(vec![7, 13])),
    ("softcap", |case| case.options.softcap = Some(1.5)),
    ("alibi", |case| case.options.alibi = Some(AlibiShape::Heads)),
    ("sinks", |case| case.options.sinks = true),
    ("dropout", |case| case.options.dropout = Some(Dropout::new(0.3, 5))),
    ("d-lse", |case| case.options.d_lse = true),
];

fn pairs(cases: &mut Vec<Case>) {
    for (index, (first, edit_first)) in OPTIONS.iter().enumerate() {
        for (second, edit_second) in &OPTIONS[index + 1..] {
            add(cases, format!("pair/{first}-{second}"), |case| {
                edit_first(case);
                edit_second(case);
            });
        }
        add(cases, format!("end-to-end/{first}"), |case| {
            edit_first(case);
            case.saved = Saved::Backend;
        });
    }
    add(cases, "end-to-end/plain", |case| case.saved = Saved::Backend);
    add(cases, "end-to-end/all", |case| {
        for (_, edit) in &OPTIONS {
            edit(case);
        }
        case.saved = Saved::Backend;
    });
}
