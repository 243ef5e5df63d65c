//! Plans: held by a caller, and kept by a registry.

use std::num::NonZeroUsize;
use std::sync::Arc;

use attention::core::{ForwardOutputs, Inputs, Scratch, ScratchBuffer};
use attention::{
    Attention, BackwardInputs, BackwardOutputs, Device, DeviceKind, Error, Gradients, Implementation,
    InvalidCall, Reason, Registry, Role, Tensor, View, ViewMut,
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

/// Every implementation of this build for host memory, forward and backward: one plan, four threads, the same bits.
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
