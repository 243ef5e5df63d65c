//! Cases about memory: every layout, for all tensors together and for single ones.

use attention_core::{Dropout, Role};

use super::{AlibiShape, Broadcast, Case, Layout, Layouts, dims};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    everywhere(&mut cases);
    single_tensors(&mut cases);
    numbers(&mut cases);
    fused(&mut cases);
    broadcast(&mut cases);
    cases
}

/// A call with every kind of tensor.
fn with_all_tensors(name: String) -> Case {
    let mut case = Case::new(name, dims([2, 9, 11, 4, 2, 8]));
    case.options.mask = Some(Broadcast::FULL);
    case.options.bias = Some(Broadcast::FULL);
    case.options.alibi = Some(AlibiShape::BatchHeads);
    case.options.sinks = true;
    case.options.d_lse = true;
    case
}

const KINDS: [(&str, Layout); 7] = [
    ("bnth", Layout::Transposed),
    ("padded", Layout::Padded),
    ("inner-stride", Layout::InnerStride),
    ("reversed-batch", Layout::Reversed { axis: 0 }),
    ("reversed-sequence", Layout::Reversed { axis: 1 }),
    ("reversed-heads", Layout::Reversed { axis: 2 }),
    ("reversed-inner", Layout::Reversed { axis: 3 }),
];

fn everywhere(cases: &mut Vec<Case>) {
    for (name, layout) in KINDS {
        for (suffix, t, s, h) in [("", 7, 9, 16), ("-odd", 17, 33, 33), ("-decode", 1, 40, 64)] {
            let mut case = Case::new(format!("layout/{name}{suffix}"), dims([2, t, s, 4, 2, h]));
            case.layouts = Layouts::operands(layout);
            cases.push(case);
        }
        let mut case = Case::new(format!("layout/{name}-causal"), dims([2, 20, 20, 2, 2, 24]));
        case.layouts = Layouts::operands(layout);
        case.options.causal = true;
        cases.push(case);
        let mut case = with_all_tensors(format!("layout/{name}-everything"));
        case.layouts = Layouts::everything(layout);
        cases.push(case);
    }
}

fn single_tensors(cases: &mut Vec<Case>) {
    for role in Role::ALL.into_iter().filter(|role| !role.is_data()) {
        for (name, layout) in
            [("bnth", Layout::Transposed), ("padded", Layout::Padded), ("inner-stride", Layout::InnerStride)]
        {
            let mut case = with_all_tensors(format!("layout/{}-{name}", role.name().replace(' ', "-")));
            case.layouts = Layouts::default().with(role, layout);
            cases.push(case);
        }
    }
}

/// Tensors of lengths, offsets, and of a dropout's seed and offset.
fn numbers(cases: &mut Vec<Case>) {
    for (name, layout) in [
        ("inner-stride", Layout::InnerStride),
        ("reversed", Layout::Reversed { axis: 0 }),
        ("expanded", Layout::Broadcast { axis: 0 }),
    ] {
        let roles = Role::DATA.map(|role| (role.name().replace([' ', '/'], "-"), vec![role]));
        for (which, roles) in roles.into_iter().chain([("numbers".to_owned(), Role::DATA.to_vec())]) {
            let mut case = Case::new(format!("layout/{which}-{name}"), dims([3, 9, 11, 4, 2, 8]));
            let expanded = name == "expanded";
            case.options.causal = true;
            case.options.query_lengths = Some(if expanded { vec![7; 3] } else { vec![7, 9, 4] });
            case.options.key_value_lengths = Some(if expanded { vec![10; 3] } else { vec![11, 5, 8] });
            case.options.query_offsets = Some(if expanded { vec![2; 3] } else { vec![2, 0, 5] });
            case.options.dropout = Some(Dropout::new(0.2, 77).with_offset(3));
            case.options.dropout_tensors = true;
            case.layouts =
                roles.into_iter().fold(Layouts::default(), |layouts, role| layouts.with(role, layout));
            cases.push(case);
        }
    }
}

fn fused(cases: &mut Vec<Case>) {
    for (n, k, h) in [(2, 2, 16), (4, 2, 8), (6, 1, 33), (3, 3, 64)] {
        for causal in [false, true] {
            let suffix = if causal { "-causal" } else { "" };
            let mut case =
                Case::new(format!("layout/fused-qkv-n{n}-k{k}-h{h}{suffix}"), dims([2, 13, 13, n, k, h]));
            case.layouts = Layouts::fused_qkv(n, k);
            case.options.causal = causal;
            cases.push(case);
        }
    }
}

fn broadcast(cases: &mut Vec<Case>) {
    for (axis, name) in ["batch", "sequence", "heads", "inner"].into_iter().enumerate() {
        for role in [Role::Query, Role::Key, Role::Value, Role::DOut] {
            let mut case =
                Case::new(format!("layout/{}-broadcast-{name}", role.name()), dims([3, 6, 8, 4, 2, 16]));
            case.layouts = Layouts::default().with(role, Layout::Broadcast { axis });
            case.options.causal = axis == 1;
            cases.push(case);
        }
        let mut case = Case::new(format!("layout/key-value-broadcast-{name}"), dims([3, 6, 8, 4, 2, 16]));
        case.layouts = Layouts::default()
            .with(Role::Key, Layout::Broadcast { axis })
            .with(Role::Value, Layout::Broadcast { axis });
        cases.push(case);
        // An expanded mask or bias has full size and stride 0.
        let mut case = with_all_tensors(format!("layout/mask-bias-expanded-{name}"));
        case.layouts = Layouts::default()
            .with(Role::Mask, Layout::Broadcast { axis })
            .with(Role::Bias, Layout::Broadcast { axis });
        cases.push(case);
    }
}
