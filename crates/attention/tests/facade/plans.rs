//! Plans: held by a caller, and kept by a registry.

use std::num::NonZeroUsize;
use std::sync::Arc;

use attention::core::{ForwardOutputs, Inputs, Scratch, ScratchBuffer};
use attention::{
    Attention, BackwardInputs, BackwardOutputs, CallData, Device, DeviceKind, Dropout, Error, Gradients,
    Implementation, InvalidCall, QueryOffset, Reason, Registry, Role, Tensor, View, ViewMut,
};

use crate::support::{Planning, Toy, numbers, registry};

/// Query, key and value, B1 T3 S`keys` N2 H4.
fn data(keys: usize) -> [Tensor; 3] {
    let of = |length: usize, seed| Tensor::from_vec(numbers(length * 8, seed), [1, length, 2, 4]).unwrap();
    [of(3, 1), of(keys, 2), of(keys, 3)]
}

fn call(attention: &Attention<'_>, keys: usize) -> Tensor {
    let [q, k, v] = data(keys);
    attention.forward(&q, &k, &v).unwrap()
}

#[test]
fn calls_of_one_problem_are_planned_once() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let attention = Attention::new().registry(&registry);
    for _ in 0..5 {
        call(&attention, 3);
    }
    assert_eq!((toy.plans(), toy.runs()), (1, 5));
    // Whatever differs in the problem is another plan, and so is what is asked of the choice.
    call(&attention, 4);
    call(&attention.clone().causal(true), 3);
    call(&attention.clone().scratch_limit(1 << 20), 3);
    call(&attention.clone().implementation("toy"), 3);
    call(&attention.clone().implementation(toy.clone()), 3);
    call(&attention.clone().implementation(["toy"]), 3);
    assert_eq!(toy.plans(), 7);
    for _ in 0..2 {
        call(&attention.clone().implementation(toy.clone()), 3);
        call(&attention.clone().implementation(["toy"]), 3);
    }
    assert_eq!(toy.plans(), 7);
    // Clones share plans; a registry that another joins does not.
    call(&Attention::new().registry(&registry.clone()), 3);
    assert_eq!(toy.plans(), 7);
    let joined = registry.clone().with(Toy::new("other").arc());
    call(&Attention::new().registry(&joined), 3);
    assert_eq!(toy.plans(), 8);
    registry.forget_plans();
    call(&attention, 3);
    assert_eq!(toy.plans(), 9);
}

/// One plan, whatever the numbers of the call: what they are is not in the problem.
#[test]
fn calls_that_differ_in_their_numbers_have_one_plan() {
    let plans_of = |calls: &mut dyn Iterator<Item = Attention<'_>>| {
        let toy = Toy::new("toy").arc();
        let registry = registry([toy.clone()]);
        let mut outputs: Vec<Tensor> = Vec::new();
        for attention in calls {
            let attention = attention.causal(true);
            let out = call(&attention.clone().registry(&registry), 8);
            // The same as with a plan of its own.
            assert_eq!(call(&attention.implementation(Toy::new("other").arc()), 8), out);
            outputs.push(out);
        }
        assert_eq!(toy.runs(), outputs.len());
        // Numbers that count.
        assert!(outputs.windows(2).all(|pair| pair[0] != pair[1]));
        toy.plans()
    };
    let new = Attention::new;
    // A cache that grows, and what says where its last query is.
    let bottom_right = || new().query_offset(QueryOffset::BottomRight);
    assert_eq!(plans_of(&mut (1..=8).map(|filled| bottom_right().key_value_lengths([filled]))), 1);
    let tensors: Vec<[i32; 1]> = (1..=8).map(|filled| [filled]).collect();
    assert_eq!(
        plans_of(&mut tensors.iter().map(|filled| bottom_right().key_value_lengths((filled, [1])))),
        1
    );
    assert_eq!(plans_of(&mut (1..=3).map(|real| new().query_lengths([real]))), 1);
    assert_eq!(plans_of(&mut (1..=5).map(|cached| new().query_offset(QueryOffset::Fixed(cached)))), 1);
    assert_eq!(plans_of(&mut (0..=5).map(|cached| new().query_offsets([cached]))), 1);
    // Offset 0 is the top-left alignment, which kernels know before any call.
    assert_eq!(plans_of(&mut (0..=5).map(|cached| new().query_offset(QueryOffset::Fixed(cached)))), 2);
    assert_eq!(plans_of(&mut (1..=5).map(|scale| new().scale(f64::from(scale)))), 1);
    // No scale is a scale; others than ordinary ones are planned apart.
    assert_eq!(plans_of(&mut [None, Some(2.0)].into_iter().map(|scale| new().scale(scale))), 1);
    assert_eq!(plans_of(&mut [-1.0, -2.0, 1.0].into_iter().map(|scale| new().scale(scale))), 2);
    assert_eq!(plans_of(&mut (1..=5).map(|cap| new().softcap(f64::from(cap) / 10.0))), 1);
    let dropout = |seed| Dropout::new(0.5, seed);
    assert_eq!(plans_of(&mut (1..=5).map(|seed| new().dropout(dropout(seed)))), 1);
    assert_eq!(plans_of(&mut (1..=5).map(|step| new().dropout(dropout(1).with_offset(step)))), 1);
    let seeds: Vec<[i64; 1]> = (1..=5).map(|seed| [seed]).collect();
    let seeded = |seed| new().dropout(dropout(0)).dropout_seed((seed, [1]));
    assert_eq!(plans_of(&mut seeds.iter().map(seeded)), 1);
    // The rate is the problem's.
    assert_eq!(plans_of(&mut (1..=3).map(|rate| new().dropout(Dropout::new(f64::from(rate) / 10.0, 1)))), 3);
}

/// The same for implementations of this build: one plan serves other numbers with the bits of a plan of its
/// own.
#[test]
fn one_plan_has_the_bits_of_a_plan_for_each_call() {
    let [q, k, v, d_out] =
        [1, 2, 3, 4].map(|seed| Tensor::from_vec(numbers(1280, seed), [2, 40, 2, 8]).unwrap());
    let steps = |step: usize| {
        Attention::new()
            .causal(true)
            .query_lengths([40 - step, 1 + step])
            .key_value_lengths([1 + step, 40 - step])
            .query_offset(1 + step)
            .scale(0.1 * (1 + step) as f64)
            .softcap(1.0 + step as f64)
            .dropout(Dropout::new(0.25, step as u64).with_offset(step as u32))
    };
    for backend in Registry::shared()
        .backends()
        .iter()
        .filter(|backend| backend.capabilities().device == DeviceKind::Cpu)
    {
        let shared = Registry::empty().with(backend.clone());
        for step in 0..30 {
            let run = |registry: &Registry| {
                let call = steps(step).registry(registry);
                let forward = call.forward_with_lse(&q, &k, &v).unwrap();
                let gradients = call.backward(&q, &k, &v, &forward, &d_out).unwrap();
                (forward.out, forward.lse, gradients)
            };
            assert_eq!(run(&shared), run(&Registry::empty().with(backend.clone())), "{step}");
        }
        // Held, and called with the numbers of each step.
        let plan = {
            let call = steps(0).registry(&shared);
            call.plan(&call.problem_with_lse(&q, &k, &v).unwrap()).unwrap()
        };
        for step in 0..30 {
            let call = steps(step);
            let want = call.clone().registry(&shared).forward_with_lse(&q, &k, &v).unwrap();
            let (mut out, mut lse) =
                (Tensor::zeros::<f32>([2, 40, 2, 8]).unwrap(), Tensor::zeros::<f32>([2, 40, 2]).unwrap());
            let outputs = ForwardOutputs { out: out.view_mut(), lse: Some(lse.view_mut()) };
            let inputs = Inputs { data: call.data(), ..Inputs::new(q.view(), k.view(), v.view()) };
            plan.forward_into(inputs, outputs).unwrap();
            assert_eq!((out, lse), (want.out, want.lse));
        }
    }
}

/// A plan has no numbers of its own, and refuses calls with others than its problem announces.
#[test]
fn a_held_plan_takes_the_numbers_of_its_calls() {
    let toy = Toy::new("toy").arc();
    let attention = Attention::new().implementation(toy.clone()).scale(0.5).key_value_lengths([2]);
    let [q, k, v] = data(8);
    let step = attention.plan(&attention.problem(&q, &k, &v).unwrap()).unwrap();
    let run = |data: CallData<'_>| {
        let mut out = Tensor::zeros::<f32>([1, 3, 2, 4]).unwrap();
        let inputs = Inputs { data, ..Inputs::new(q.view(), k.view(), v.view()) };
        step.forward_into(inputs, ForwardOutputs { out: out.view_mut(), lse: None }).map(|()| out)
    };
    assert_eq!(run(attention.data()).unwrap(), attention.forward(&q, &k, &v).unwrap());
    let other = attention.clone().scale(2.0).key_value_lengths([7]);
    assert_eq!(run(other.data()).unwrap(), other.forward(&q, &k, &v).unwrap());
    assert_eq!((toy.plans(), toy.runs()), (1, 4));
    // The scale is the default one, where nothing is said.
    let lengths = CallData { scale: None, ..attention.data() };
    assert_eq!(run(lengths).unwrap(), attention.clone().scale(None).forward(&q, &k, &v).unwrap());
    let runs = toy.runs();
    let narrow = [2i32];
    let data = attention.data();
    for (wrong, message) in [
        (CallData::default(), "the problem has key/value lengths, the call was given none"),
        (attention.clone().query_lengths([1]).data(), "the call was given query lengths"),
        (
            CallData { key_value_lengths: View::from_slice(&narrow, [1]).ok(), ..data },
            "key/value lengths is i32 [1]",
        ),
        (attention.clone().softcap(3.0).data(), "softcap of the call: given; of its problem: not given"),
        (attention.clone().query_offset(3).data(), "query offset of the call: 3; of its problem: top-left"),
        (attention.clone().scale(-1.0).data(), "scale is -1, and the problem was made for scales from"),
        (
            attention.clone().dropout(Dropout::new(0.5, 1)).data(),
            "dropout rate of the call: 0.5; of its problem: none",
        ),
    ] {
        let text = run(wrong).unwrap_err().to_string();
        assert!(text.starts_with("invalid call: ") && text.contains(message), "{text}");
    }
    assert_eq!(toy.runs(), runs);
}

#[test]
fn backward_and_forward_have_a_plan_each() {
    let toy = Toy::new("toy").arc();
    let attention = Attention::new().registry(&registry([toy.clone()]));
    let [q, k, v] = data(3);
    for _ in 0..3 {
        let forward = attention.forward_with_lse(&q, &k, &v).unwrap();
        attention.backward(&q, &k, &v, &forward, &q).unwrap();
        attention.backward_recompute(&q, &k, &v, &q).unwrap();
    }
    assert_eq!((toy.plans(), toy.runs()), (2, 12));
}

#[test]
fn the_plan_that_was_not_used_for_longest_leaves_first() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]).with_plans_kept(NonZeroUsize::new(2).unwrap());
    assert_eq!(registry.plans_kept().get(), 2);
    let attention = Attention::new().registry(&registry);
    call(&attention, 3);
    call(&attention, 4);
    call(&attention, 3);
    assert_eq!(toy.plans(), 2);
    // 4 leaves, and 3 stays.
    call(&attention, 5);
    call(&attention, 3);
    assert_eq!(toy.plans(), 3);
    call(&attention, 4);
    assert_eq!(toy.plans(), 4);
}

#[test]
fn a_failure_to_plan_is_not_kept_and_one_that_was_passed_over_is_not_asked_again() {
    let (failing, toy) = (Toy::new("failing").planning(Planning::Fails).arc(), Toy::new("toy").arc());
    let registry = registry([failing.clone(), toy.clone()]);
    let attention = Attention::new().registry(&registry);
    let [q, k, v] = data(3);
    for _ in 0..2 {
        assert!(attention.clone().implementation("failing").forward(&q, &k, &v).is_err());
    }
    assert_eq!(failing.plans(), 2);
    for _ in 0..2 {
        call(&attention, 3);
    }
    assert_eq!((failing.plans(), toy.plans()), (3, 1));
}

#[test]
fn a_held_plan_runs_without_its_registry_and_says_what_it_is() {
    let toy = Toy::new("toy").scratch(64).arc();
    let shape = [1, 3, 2, 4];
    let [q, k, v] = data(3);
    let (want, step) = {
        let registry = registry([toy.clone()]);
        let attention = Attention::new().registry(&registry).causal(true);
        let problem = attention.problem_with_lse(&q, &k, &v).unwrap();
        let step = attention.plan(&problem).unwrap();
        assert_eq!(step.problem(), &problem);
        registry.forget_plans();
        (attention.forward_with_lse(&q, &k, &v).unwrap(), step)
    };
    assert_eq!(
        (step.backend().name(), step.reason(), step.scratch_bytes()),
        ("toy", Reason::FirstInOrder, 64)
    );
    assert_eq!((step.backend_plan().backend(), step.passed_over()), ("toy", &[][..]));
    let runs = toy.runs();
    let inputs = Inputs::new(q.view(), k.view(), v.view());
    let mut scratch = ScratchBuffer::new(64);
    for with_scratch in [false, true, false] {
        let (mut out, mut lse) = (vec![f32::NAN; 24], vec![f32::NAN; 6]);
        let outputs = ForwardOutputs {
            out: ViewMut::from_slice(&mut out, shape).unwrap(),
            lse: Some(ViewMut::from_slice(&mut lse, [1, 3, 2]).unwrap()),
        };
        if with_scratch {
            step.forward_with_scratch(inputs, outputs, scratch.scratch()).unwrap();
        } else {
            step.clone().forward_into(inputs, outputs).unwrap();
        }
        assert_eq!(
            (Some(&out[..]), Some(&lse[..])),
            (want.out.as_slice::<f32>(), want.lse.as_slice::<f32>())
        );
    }
    assert_eq!(toy.runs(), runs + 3);
    let mut out = vec![0.0f32; 24];
    let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, shape).unwrap(), lse: None };
    let error = step.forward_into(inputs, outputs).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: the problem has lse, the call was given none");
    let mut lse = vec![0.0f32; 6];
    let outputs = ForwardOutputs {
        out: ViewMut::from_slice(&mut out, shape).unwrap(),
        lse: Some(ViewMut::from_slice(&mut lse, [1, 3, 2]).unwrap()),
    };
    let error = step.forward_with_scratch(inputs, outputs, Scratch::none(Device::Cpu)).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: scratch of 0 bytes is too small, 64 are needed");
    assert_eq!((toy.runs(), out), (runs + 3, vec![0.0; 24]));
}

#[test]
fn a_held_plan_has_the_order_of_axes_of_its_call() {
    let toy: Implementation = Toy::new("toy").arc().into();
    let [q, k, v, d_out] =
        [1, 2, 3, 4].map(|seed| Tensor::from_vec(numbers(24, seed), [1, 2, 3, 4]).unwrap());
    let attention = Attention::bnth().implementation(toy);
    let want = attention.forward_with_lse(&q, &k, &v).unwrap();
    let want_gradients = attention.backward(&q, &k, &v, &want, &d_out).unwrap();
    let inputs = Inputs::new(q.view(), k.view(), v.view());

    let problem = attention.problem_with_lse(&q, &k, &v).unwrap();
    let (mut out, mut lse) =
        (Tensor::zeros::<f32>([1, 2, 3, 4]).unwrap(), Tensor::zeros::<f32>([1, 2, 3]).unwrap());
    let outputs = ForwardOutputs { out: out.view_mut(), lse: Some(lse.view_mut()) };
    attention.plan(&problem).unwrap().forward_into(inputs, outputs).unwrap();
    assert_eq!((&out, &lse), (&want.out, &want.lse));

    let attention = attention.gradients(Gradients::QKV);
    let problem = attention.backward_problem(&q, &k, &v).unwrap();
    let plan = attention.plan(&problem).unwrap();
    let mut gradients = [(); 3].map(|()| Tensor::zeros::<f32>([1, 2, 3, 4]).unwrap());
    let saved = BackwardInputs { out: out.view(), lse: lse.view(), d_out: d_out.view(), d_lse: None };
    let [dq, dk, dv] = gradients.each_mut().map(|gradient| Some(gradient.view_mut()));
    plan.backward_into(inputs, saved, BackwardOutputs { dq, dk, dv, ..Default::default() }).unwrap();
    let [dq, dk, dv] = gradients;
    assert_eq!((dq, dk, dv), want_gradients.into_qkv().unwrap());
}

#[test]
fn tensors_that_are_not_those_of_the_plan_are_refused() {
    let toy = Toy::new("toy").arc();
    let attention = Attention::new().implementation(toy.clone());
    let [q, k, v] = data(3);
    let step = attention.plan(&attention.problem(&q, &k, &v).unwrap()).unwrap();
    let longer = data(4);
    let mut out = Tensor::zeros::<f32>([1, 3, 2, 4]).unwrap();
    let inputs = Inputs::new(q.view(), longer[1].view(), longer[2].view());
    let error = step.forward_into(inputs, ForwardOutputs { out: out.view_mut(), lse: None }).unwrap_err();
    assert!(
        matches!(
            &error,
            Error::Core(attention::core::Error::InvalidCall(InvalidCall::NotAsInProblem {
                role: Role::Key,
                ..
            }))
        ),
        "{error}"
    );
    assert_eq!(toy.runs(), 0);
}

/// Every implementation of this build for host memory, forward and backward: one plan, four threads, the same
/// bits.
#[test]
fn threads_call_one_plan_at_once() {
    let data = [1, 2, 3, 4].map(|seed| Tensor::from_vec(numbers(1280, seed), [2, 40, 2, 8]).unwrap());
    let [q, k, v, d_out] = &data;
    for backend in Registry::shared()
        .backends()
        .iter()
        .filter(|backend| backend.capabilities().device == DeviceKind::Cpu)
    {
        let attention =
            Attention::new().implementation(backend.clone()).causal(true).gradients(Gradients::QKV);
        let forward = attention.forward_with_lse(q, k, v).unwrap();
        let want = attention.backward(q, k, v, &forward, d_out).unwrap();
        let plan = attention.plan(&attention.problem_with_lse(q, k, v).unwrap()).unwrap();
        let backward = attention.plan(&attention.backward_problem(q, k, v).unwrap()).unwrap();
        let call = || {
            let zeros = || Tensor::zeros::<f32>([2, 40, 2, 8]).unwrap();
            let (mut out, mut lse) = (zeros(), Tensor::zeros::<f32>([2, 40, 2]).unwrap());
            let inputs = Inputs::new(q.view(), k.view(), v.view());
            let outputs = ForwardOutputs { out: out.view_mut(), lse: Some(lse.view_mut()) };
            plan.forward_into(inputs, outputs).unwrap();
            assert_eq!((&out, &lse), (&forward.out, &forward.lse));
            let (mut dq, mut dk, mut dv) = (zeros(), zeros(), zeros());
            let saved = BackwardInputs { out: out.view(), lse: lse.view(), d_out: d_out.view(), d_lse: None };
            let [dq_view, dk_view, dv_view] =
                [&mut dq, &mut dk, &mut dv].map(|tensor| Some(tensor.view_mut()));
            let outputs = BackwardOutputs { dq: dq_view, dk: dk_view, dv: dv_view, ..Default::default() };
            backward.backward_into(inputs, saved, outputs).unwrap();
            assert_eq!((Some(dq), Some(dk), Some(dv)), (want.dq.clone(), want.dk.clone(), want.dv.clone()));
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10).for_each(|_| call()));
            }
        });
    }
}

#[test]
fn threads_share_plans() {
    let toy = Toy::new("toy").arc();
    let registry: Registry = registry([toy.clone()]);
    call(&Attention::new().registry(&registry), 3);
    let x = [0.5f32; 8];
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let x = View::from_slice(&x, [1, 1, 2, 4]).unwrap();
                for _ in 0..50 {
                    call(&Attention::new().registry(&registry), 3);
                    Attention::new().registry(&registry).forward(x, x, x).unwrap();
                }
            });
        }
    });
    assert_eq!(toy.runs(), 401);
    // The threads may have planned the second problem side by side, and then used the plan of one of them.
    assert!((2..=5).contains(&toy.plans()), "{} plans", toy.plans());
    let _: Arc<Toy> = toy;
}
