//! Calls: data against the problem, tensor by tensor.

use crate::{
    BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Device, Dropout, ForwardCall,
    ForwardOutputs, Gradients, Inputs, InvalidCall, Problem, Role, TensorDesc, View, ViewMut,
};

const B: usize = 2;
const T: usize = 3;
const S: usize = 5;
const N: usize = 4;
const K: usize = 2;
const H: usize = 8;
const HV: usize = 6;

/// Memory for every tensor of a call, each with the shape it must have.
struct Memory {
    floats: Vec<(Role, Vec<f32>)>,
    mask: Vec<bool>,
    query_lengths: [i32; B],
    key_value_lengths: [u32; B],
    query_offsets: [i64; B],
    dropout_seed: [i64; 1],
    dropout_offset: [i32; 1],
    new_out: Vec<f32>,
    new_lse: Vec<f32>,
}

fn shape(role: Role) -> &'static [usize] {
    match role {
        Role::Query | Role::DQuery => &[B, T, N, H],
        Role::Key | Role::DKey => &[B, S, K, H],
        Role::Value | Role::DValue => &[B, S, K, HV],
        Role::Out | Role::DOut => &[B, T, N, HV],
        Role::Lse | Role::DLse => &[B, T, N],
        Role::Mask | Role::Bias | Role::DBias => &[T, S],
        Role::AlibiSlopes | Role::Sinks | Role::DSinks => &[N],
        Role::QueryLengths | Role::KeyValueLengths | Role::QueryOffsets => &[B],
        Role::DropoutSeed | Role::DropoutOffset => &[1],
        other => panic!("{other} in a dense call of one dtype"),
    }
}

impl Memory {
    fn new() -> Self {
        let floats = Role::ALL.into_iter().filter(|role| !role.is_data());
        let floats = floats.map(|role| (role, vec![0.0; shape(role).iter().product()])).collect();
        Self {
            floats,
            mask: vec![true; T * S],
            query_lengths: [3, 1],
            key_value_lengths: [0, 5],
            query_offsets: [-2, 7],
            dropout_seed: [-1],
            dropout_offset: [3],
            new_out: vec![f32::NAN; B * T * N * HV],
            new_lse: vec![f32::NAN; B * T * N],
        }
    }

    /// Shared views of all that forward and backward read, and exclusive ones of all that they write.
    fn views(&mut self) -> (Inputs<'_>, BackwardInputs<'_>, ForwardOutputs<'_>, BackwardOutputs<'_>) {
        let (mut read, mut written) = (Vec::new(), Vec::new());
        for (role, data) in &mut self.floats {
            let dims = crate::Dims::from_slice(shape(*role)).unwrap();
            match role {
                Role::DQuery | Role::DKey | Role::DValue | Role::DBias | Role::DSinks => {
                    written.push(Some(ViewMut::from_slice(data, dims).unwrap()));
                }
                _ => read.push((*role, View::from_slice(data, dims).unwrap())),
            }
        }
        let of = |role: Role| read.iter().find(|(candidate, _)| *candidate == role).unwrap().1;
        let mut inputs = Inputs::new(of(Role::Query), of(Role::Key), of(Role::Value));
        inputs.mask = Some(View::from_slice(&self.mask, [T, S]).unwrap());
        inputs.bias = Some(of(Role::Bias));
        inputs.alibi_slopes = Some(of(Role::AlibiSlopes));
        inputs.sinks = Some(of(Role::Sinks));
        inputs.data = CallData {
            query_offsets: Some(View::from_slice(&self.query_offsets, [B]).unwrap()),
            query_lengths: Some(View::from_slice(&self.query_lengths, [B]).unwrap()),
            key_value_lengths: Some(View::from_slice(&self.key_value_lengths, [B]).unwrap()),
            dropout: Some(Dropout::new(0.5, 0)),
            dropout_seed: Some(View::from_slice(&self.dropout_seed, [1]).unwrap()),
            dropout_offset: Some(View::from_slice(&self.dropout_offset, [1]).unwrap()),
            ..CallData::default()
        };
        let saved = BackwardInputs {
            out: of(Role::Out),
            lse: of(Role::Lse),
            d_out: of(Role::DOut),
            d_lse: Some(of(Role::DLse)),
        };
        let forward = ForwardOutputs {
            out: ViewMut::from_slice(&mut self.new_out, [B, T, N, HV]).unwrap(),
            lse: Some(ViewMut::from_slice(&mut self.new_lse, [B, T, N]).unwrap()),
        };
        let mut next = written.into_iter();
        let mut take = || next.next().unwrap();
        let (dq, dk, dv, dbias, dsinks) = (take(), take(), take(), take(), take());
        (inputs, saved, forward, BackwardOutputs { dq, dk, dv, dbias, dsinks })
    }
}

fn all() -> Gradients {
    Gradients::QKV | Gradients::BIAS | Gradients::SINKS
}

fn forward_problem(inputs: &Inputs<'_>) -> Problem {
    inputs.problem().lse(true).build().unwrap()
}

fn backward_problem(inputs: &Inputs<'_>) -> Problem {
    inputs.problem().gradients(all()).d_lse(true).build().unwrap()
}

#[test]
fn full_calls_are_accepted_and_handed_on() {
    let mut memory = Memory::new();
    let (inputs, saved, outputs, gradients) = memory.views();
    let problem = forward_problem(&inputs);
    let call = ForwardCall::new(&problem, inputs, outputs).unwrap();
    assert_eq!(call.problem(), &problem);
    let (of, given, outputs) = call.into_parts();
    assert!(std::ptr::eq(of.problem(), &problem));
    assert_eq!(given.query.as_ptr(), inputs.query.as_ptr());
    assert_eq!(outputs.lse.unwrap().shape(), [B, T, N].into());
    let numbers = |call: crate::CallProblem<'_>| {
        let sequence = call.sequence(1);
        assert_eq!((sequence.queries(), sequence.keys(), sequence.offset()), (1, 5, 7));
        let want = Dropout::new(0.5, u64::MAX).with_offset(3);
        assert_eq!(call.dropout_stream(), Some(want.stream().unwrap()));
    };
    numbers(of);

    let problem = backward_problem(&inputs);
    let call = BackwardCall::new(&problem, inputs, saved, gradients).unwrap();
    assert_eq!(call.problem(), &problem);
    let (of, given, saved, gradients) = call.into_parts();
    numbers(of);
    // Mask, bias and the bias's gradient have the four axes of the problem's description.
    assert_eq!(given.mask.unwrap().shape(), [1, 1, T, S].into());
    assert_eq!(given.bias.unwrap().shape(), [1, 1, T, S].into());
    assert_eq!(gradients.dbias.unwrap().shape(), [1, 1, T, S].into());
    assert_eq!(given.sinks.unwrap().shape(), [N].into());
    assert!(saved.d_lse.is_some() && gradients.dq.is_some() && gradients.dsinks.is_some());
}

#[test]
fn masks_and_biases_of_every_rank_come_out_with_four_axes() {
    let full = [B, N, T, S];
    for rank in 1..=4 {
        let given = crate::Dims::from_slice(&full[4 - rank..]).unwrap();
        let count = given.iter().product();
        let (mask, bias, mut dbias) = (vec![true; count], vec![0f32; count], vec![0f32; count]);
        let mut memory = Memory::new();
        let (mut inputs, saved, outputs, mut gradients) = memory.views();
        inputs.mask = Some(View::from_slice(&mask, given).unwrap());
        inputs.bias = Some(View::from_slice(&bias, given).unwrap());
        gradients.dbias = Some(ViewMut::from_slice(&mut dbias, given).unwrap());
        let mut want = [1; 4];
        want[4 - rank..].copy_from_slice(&given);

        let problem = forward_problem(&inputs);
        let (_, parts, _) = ForwardCall::new(&problem, inputs, outputs).unwrap().into_parts();
        for view in [parts.mask.unwrap(), parts.bias.unwrap()] {
            assert_eq!(view.shape(), want.into());
            assert_eq!(
                view.desc().strides()[4 - rank..],
                TensorDesc::contiguous(DType::F32, given).strides()[..]
            );
        }
        let problem = backward_problem(&inputs);
        let call = BackwardCall::new(&problem, inputs, saved, gradients).unwrap();
        assert_eq!(call.into_parts().3.dbias.unwrap().shape(), want.into());
    }
}

#[test]
fn a_mask_may_name_more_axes_of_size_one_than_the_problem_was_told() {
    let mut memory = Memory::new();
    let (mut inputs, _, outputs, _) = memory.views();
    let problem = forward_problem(&inputs);
    inputs.mask = inputs.mask.map(|mask| mask.unsqueeze().unwrap());
    let (_, parts, _) = ForwardCall::new(&problem, inputs, outputs).unwrap().into_parts();
    assert_eq!(parts.mask.unwrap().shape(), [1, 1, T, S].into());
}

fn with<'a>(inputs: Inputs<'a>, data: CallData<'a>) -> Inputs<'a> {
    Inputs { data, ..inputs }
}

/// Takes one input away.
fn without<'a>(inputs: Inputs<'a>, role: Role) -> Inputs<'a> {
    match role {
        Role::Mask => Inputs { mask: None, ..inputs },
        Role::Bias => Inputs { bias: None, ..inputs },
        Role::AlibiSlopes => Inputs { alibi_slopes: None, ..inputs },
        Role::Sinks => Inputs { sinks: None, ..inputs },
        Role::QueryLengths => with(inputs, CallData { query_lengths: None, ..inputs.data }),
        Role::KeyValueLengths => with(inputs, CallData { key_value_lengths: None, ..inputs.data }),
        Role::QueryOffsets => with(inputs, CallData { query_offsets: None, ..inputs.data }),
        Role::DropoutSeed => with(inputs, CallData { dropout_seed: None, ..inputs.data }),
        Role::DropoutOffset => with(inputs, CallData { dropout_offset: None, ..inputs.data }),
        other => panic!("{other} is not optional"),
    }
}

#[test]
fn optional_inputs_must_be_there_exactly_where_the_problem_has_them() {
    let optional = [Role::Mask, Role::Bias, Role::AlibiSlopes, Role::Sinks];
    for role in optional.into_iter().chain(Role::DATA) {
        let mut memory = Memory::new();
        let (inputs, _, outputs, _) = memory.views();
        let problem = forward_problem(&inputs);
        let refused = ForwardCall::new(&problem, without(inputs, role), outputs).unwrap_err();
        assert_eq!(refused, InvalidCall::Missing { role });

        let (inputs, saved, outputs, gradients) = memory.views();
        let lacking = without(inputs, role);
        let problem = lacking.problem().lse(true).build().unwrap();
        let refused = ForwardCall::new(&problem, inputs, outputs).unwrap_err();
        assert_eq!(refused, InvalidCall::Unexpected { role });
        let problem = lacking.problem().gradients(Gradients::QKV).d_lse(true).build().unwrap();
        let refused = BackwardCall::new(&problem, inputs, saved, gradients).unwrap_err();
        assert_eq!(refused, InvalidCall::Unexpected { role });
    }
}

#[test]
fn outputs_must_be_there_exactly_where_the_problem_has_them() {
    let mut memory = Memory::new();
    let (inputs, saved, outputs, _) = memory.views();
    let problem = forward_problem(&inputs);
    let refused = ForwardCall::new(&problem, inputs, ForwardOutputs { lse: None, ..outputs }).unwrap_err();
    assert_eq!(refused, InvalidCall::Missing { role: Role::Lse });
    let problem = backward_problem(&inputs);
    let refused = BackwardCall::new(
        &problem,
        inputs,
        BackwardInputs { d_lse: None, ..saved },
        BackwardOutputs::default(),
    );
    assert_eq!(refused.unwrap_err(), InvalidCall::Missing { role: Role::DLse });

    for (single, role) in all().iter() {
        let take = |gradients: &mut BackwardOutputs<'_>| match role {
            Role::DQuery => gradients.dq = None,
            Role::DKey => gradients.dk = None,
            Role::DValue => gradients.dv = None,
            Role::DBias => gradients.dbias = None,
            _ => gradients.dsinks = None,
        };
        let (inputs, saved, _, mut gradients) = memory.views();
        take(&mut gradients);
        let problem = backward_problem(&inputs);
        let refused = BackwardCall::new(&problem, inputs, saved, gradients).unwrap_err();
        assert_eq!(refused, InvalidCall::Missing { role });

        let (inputs, saved, _, gradients) = memory.views();
        let problem = inputs.problem().gradients(all().without(single)).d_lse(true).build().unwrap();
        let refused = BackwardCall::new(&problem, inputs, saved, gradients).unwrap_err();
        assert_eq!(refused, InvalidCall::Unexpected { role });
    }
}

#[test]
fn tensors_must_be_as_the_problem_describes_them() {
    let mut memory = Memory::new();
    let (inputs, _, _, _) = memory.views();
    let problem = forward_problem(&inputs);
    let wide = vec![0f64; B * S * K * H];
    let refused =
        |inputs: Inputs<'_>, outputs: ForwardOutputs<'_>| match ForwardCall::new(&problem, inputs, outputs)
            .unwrap_err()
        {
            InvalidCall::NotAsInProblem { role, given, expected } => {
                assert_eq!(Some(&expected), problem.tensor(role));
                assert_ne!(given, expected);
                role
            }
            other => panic!("{other}"),
        };
    let mut spare = Memory::new();
    // Another dtype, another shape, other strides, another rank.
    let key = View::from_slice(&wide, [B, S, K, H]).unwrap();
    assert_eq!(refused(Inputs { key, ..inputs }, spare.views().2), Role::Key);
    let key = inputs.key.narrow(1, 0..S - 1).unwrap();
    assert_eq!(refused(Inputs { key, ..inputs }, spare.views().2), Role::Key);
    let query = inputs.query.narrow(1, 0..1).unwrap().expand([B, T, N, H]).unwrap();
    assert_eq!(refused(Inputs { query, ..inputs }, spare.views().2), Role::Query);
    let value = inputs.value.index_axis(0, 0).unwrap();
    assert_eq!(refused(Inputs { value, ..inputs }, spare.views().2), Role::Value);
    let bias = Some(inputs.bias.unwrap().narrow(0, 0..1).unwrap());
    assert_eq!(refused(Inputs { bias, ..inputs }, spare.views().2), Role::Bias);
    let sinks = Some(inputs.sinks.unwrap().unsqueeze().unwrap());
    assert_eq!(refused(Inputs { sinks, ..inputs }, spare.views().2), Role::Sinks);
    let ForwardOutputs { out, lse } = spare.views().2;
    assert_eq!(refused(inputs, ForwardOutputs { out: out.permute([0, 2, 1, 3]).unwrap(), lse }), Role::Out);
    let ForwardOutputs { out, lse } = spare.views().2;
    let lse = lse.map(|lse| lse.unsqueeze().unwrap());
    assert_eq!(refused(inputs, ForwardOutputs { out, lse }), Role::Lse);
}

#[test]
fn strides_that_are_never_stepped_do_not_matter() {
    let data = [0f32; 8];
    let mut out = [0f32; 8];
    let view = |strides: [isize; 4]| View::strided(&data, 0, [1, 1, 1, 8], strides).unwrap();
    let problem =
        Inputs::new(view([8, 8, 8, 1]), view([8, 8, 8, 1]), view([8, 8, 8, 1])).problem().build().unwrap();
    let inputs = Inputs::new(view([0, -3, 99, 1]), view([1, 1, 1, 1]), view([8, 8, 8, 1]));
    let out = ViewMut::strided(&mut out, 0, [1, 1, 1, 8], [0, 0, 0, 1]).unwrap();
    assert!(ForwardCall::new(&problem, inputs, ForwardOutputs { out, lse: None }).is_ok());
}

#[test]
fn empty_tensors_match_in_any_layout() {
    let none: [f32; 0] = [];
    let mut out: [f32; 0] = [];
    let query = View::from_slice(&none, [0, 3, 2, 4]).unwrap();
    let problem = Inputs::new(query, query, query).problem().build().unwrap();
    let other = View::strided(&none, 7, [0, 3, 2, 4], [-1, 0, 5, 2]).unwrap();
    let out = ViewMut::from_slice(&mut out, [0, 3, 2, 4]).unwrap();
    let inputs = Inputs::new(other, query, other);
    assert!(ForwardCall::new(&problem, inputs, ForwardOutputs { out, lse: None }).is_ok());
}

#[test]
fn every_tensor_must_be_on_the_device_of_the_problem() {
    let mut memory = Memory::new();
    let (inputs, _, outputs, _) = memory.views();
    let problem = forward_problem(&inputs);
    let elsewhere = |view: View<'_>| {
        // SAFETY: a call with it is refused for the device before anything is read.
        #[allow(unsafe_code)]
        unsafe { View::from_raw_parts(view.as_ptr(), Device::Cuda(3), view.desc()) }.unwrap()
    };
    let moved = Inputs { sinks: inputs.sinks.map(elsewhere), ..inputs };
    let refused = ForwardCall::new(&problem, moved, outputs).unwrap_err();
    let elsewhere_is = |role| InvalidCall::Device { role, device: Device::Cuda(3), expected: Device::Cpu };
    assert_eq!(refused, elsewhere_is(Role::Sinks));
    let mut spare = Memory::new();
    let key_value_lengths = inputs.data.key_value_lengths.map(elsewhere);
    let moved = with(inputs, CallData { key_value_lengths, ..inputs.data });
    let refused = ForwardCall::new(&problem, moved, spare.views().2).unwrap_err();
    assert_eq!(refused, elsewhere_is(Role::KeyValueLengths));
    // The problem of inputs is where the query is.
    let moved = Inputs { query: elsewhere(inputs.query), ..inputs };
    assert_eq!(moved.problem().build().unwrap().device(), Device::Cuda(3));
}

/// Views of the same memory that Rust would not let a safe caller have.
#[allow(unsafe_code)]
fn alias<'a>(data: *mut f32, first: usize, desc: TensorDesc) -> ViewMut<'a> {
    // SAFETY: the tests keep the memory allocated, and no call that gets the view runs.
    unsafe { ViewMut::from_raw_parts(data.wrapping_add(first).cast(), Device::Cpu, desc) }.unwrap()
}

#[test]
fn outputs_must_not_share_memory_with_anything() {
    let mut memory = Memory::new();
    let mut shared = vec![0f32; 1024];
    let pointer = shared.as_mut_ptr();
    let dense =
        |role: Role| TensorDesc::contiguous(DType::F32, crate::Dims::from_slice(shape(role)).unwrap());
    let overlap = |first, second| Err(InvalidCall::Overlap { first, second });

    // Output with output, by one element.
    let (inputs, saved, _, mut gradients) = memory.views();
    let problem = backward_problem(&inputs);
    let last = dense(Role::DKey).element_count().unwrap();
    gradients.dk = Some(alias(pointer, 0, dense(Role::DKey)));
    gradients.dv = Some(alias(pointer, last - 1, dense(Role::DValue)));
    let call = BackwardCall::new(&problem, inputs, saved, gradients).map(|_| ());
    assert_eq!(call, overlap(Role::DValue, Role::DKey));
    // Side by side they are fine.
    let (inputs, saved, _, mut gradients) = memory.views();
    gradients.dk = Some(alias(pointer, 0, dense(Role::DKey)));
    gradients.dv = Some(alias(pointer, last, dense(Role::DValue)));
    assert!(BackwardCall::new(&problem, inputs, saved, gradients).is_ok());

    // Output with input.
    let (mut inputs, _, outputs, _) = memory.views();
    inputs.value = View::from_slice(&shared[..B * S * K * HV], [B, S, K, HV]).unwrap();
    let outputs = ForwardOutputs { out: alias(pointer, 7, dense(Role::Out)), ..outputs };
    let problem = forward_problem(&inputs);
    assert_eq!(ForwardCall::new(&problem, inputs, outputs).map(|_| ()), overlap(Role::Out, Role::Value));

    // Saved tensors are inputs too.
    let (inputs, mut saved, _, mut gradients) = memory.views();
    saved.d_out = View::from_slice(&shared[..B * T * N * HV], [B, T, N, HV]).unwrap();
    gradients.dq = Some(alias(pointer, 0, dense(Role::DQuery)));
    let problem = backward_problem(&inputs);
    let call = BackwardCall::new(&problem, inputs, saved, gradients).map(|_| ());
    assert_eq!(call, overlap(Role::DQuery, Role::DOut));
}

/// Numbers are read after the first element of an output may have been written.
#[test]
fn outputs_must_not_share_memory_with_numbers() {
    let dense =
        |role: Role| TensorDesc::contiguous(DType::F32, crate::Dims::from_slice(shape(role)).unwrap());
    for role in Role::DATA {
        let mut shared = vec![0i32; 1024];
        let pointer = shared.as_mut_ptr().cast::<f32>();
        let mut memory = Memory::new();
        let (inputs, saved, outputs, mut gradients) = memory.views();
        // The output ends with the first of the numbers' bytes.
        let count = |role: Role| dense(role).element_count().unwrap();
        let at = count(Role::Out) - 1;
        let numbers = View::from_slice(&shared[at..][..count(role)], dense(role).shape()).unwrap();
        let mut data = inputs.data;
        match role {
            Role::QueryLengths => data.query_lengths = Some(numbers),
            Role::KeyValueLengths => data.key_value_lengths = Some(numbers),
            Role::QueryOffsets => data.query_offsets = Some(numbers),
            Role::DropoutSeed => data.dropout_seed = Some(numbers),
            _ => data.dropout_offset = Some(numbers),
        }
        let inputs = with(inputs, data);
        let problem = forward_problem(&inputs);
        let outputs = ForwardOutputs { out: alias(pointer, 0, dense(Role::Out)), ..outputs };
        let call = ForwardCall::new(&problem, inputs, outputs).map(|_| ());
        assert_eq!(call, Err(InvalidCall::Overlap { first: Role::Out, second: role }));

        let problem = backward_problem(&inputs);
        gradients.dk = Some(alias(pointer, at, dense(Role::DKey)));
        let call = BackwardCall::new(&problem, inputs, saved, gradients).map(|_| ());
        assert_eq!(call, Err(InvalidCall::Overlap { first: Role::DKey, second: role }));
    }
}

#[test]
fn inputs_may_share_memory_with_each_other() {
    let data = vec![0f32; B * T * N * H];
    let mut out = data.clone();
    let view = View::from_slice(&data, [B, T, N, H]).unwrap();
    let inputs = Inputs::new(view, view, view);
    let problem = inputs.problem().build().unwrap();
    let out = ViewMut::from_slice(&mut out, [B, T, N, H]).unwrap();
    assert!(ForwardCall::new(&problem, inputs, ForwardOutputs { out, lse: None }).is_ok());
}

#[test]
fn gradients_of_a_fused_buffer_are_accepted_in_both_storages() {
    for bnth in [false, true] {
        let (inputs, saved);
        let mut memory = Memory::new();
        let value = vec![0f32; B * S * K * H];
        let (given, given_saved, _, _) = memory.views();
        let (query, value) = (given.query, View::from_slice(&value, [B, S, K, H]).unwrap());
        // Self-attention: S = T, and Hv = H so that one buffer holds all three.
        let key = query.narrow(2, 0..K).unwrap();
        inputs = Inputs::new(query, key, value.narrow(1, 0..T).unwrap());
        let incoming = vec![0f32; B * T * N * H];
        let d_out = View::from_slice(&incoming, [B, T, N, H]).unwrap();
        saved = BackwardInputs { out: d_out, d_out, d_lse: None, ..given_saved };

        let mut fused = vec![f32::NAN; B * T * (N + 2 * K) * H];
        let whole = if bnth {
            ViewMut::from_slice(&mut fused, [B, N + 2 * K, T, H]).unwrap().permute([0, 2, 1, 3]).unwrap()
        } else {
            ViewMut::from_slice(&mut fused, [B, T, N + 2 * K, H]).unwrap()
        };
        let [dq, dk, dv] = whole.split(2, [N, K, K]).unwrap();
        let problem = (inputs.problem().gradients(Gradients::QKV))
            .layout(Role::DQuery, dq.desc())
            .layout(Role::DKey, dk.desc())
            .layout(Role::DValue, dv.desc())
            .build()
            .unwrap();
        let gradients = BackwardOutputs { dq: Some(dq), dk: Some(dk), dv: Some(dv), ..Default::default() };
        let call = BackwardCall::new(&problem, inputs, saved, gradients);
        assert!(call.is_ok(), "{:?}", call.err());
    }
}

#[test]
fn calls_cross_threads() {
    fn crosses<T: Send>(value: T) -> T {
        value
    }
    let mut memory = Memory::new();
    let (inputs, _, outputs, _) = memory.views();
    let problem = forward_problem(&inputs);
    let call = crosses(ForwardCall::new(&problem, inputs, outputs).unwrap());
    assert_eq!(call.problem().dims().batch, B);
}
