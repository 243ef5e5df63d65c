//! A planned problem: its kernels, compiled, and their parameters.

use std::sync::Arc;

use attention_core::{
    BackwardCall, CallProblem, Error, ForwardCall, LentScratch, Plan, Problem, Scratch, VariantCounter,
    Variants,
};
use attention_cuda::cudarc::driver::CudaFunction;
use attention_cuda::cudarc::driver::sys::CUfunction_attribute;
use attention_cuda::parameters::ProblemParameters;
use attention_cuda::{Addresses, NumberStore, failure, launch, launch_programmatic};

use super::NAME;
use super::launches::{Kernel, Launches};
use super::limits::limit;
use super::one_pass::ALL_GRADIENTS;
use super::runtime::Runtime;

/// A problem with everything that its calls share.
#[derive(Debug)]
pub(crate) struct ChunkedCudaPlan {
    problem: Problem,
    runtime: Arc<Runtime>,
    launches: Launches,
    parameters: ProblemParameters,
    store: NumberStore,
    /// Of the kernels, in order.
    functions: Vec<CudaFunction>,
    /// As well, by each of a kernel's names.
    runs: Vec<Vec<VariantCounter>>,
    /// Whether one of them gives all three gradients.
    has_one_pass: bool,
}

impl ChunkedCudaPlan {
    /// Compiles the kernels that are not compiled yet.
    pub(crate) fn new(
        problem: &Problem,
        runtime: &Arc<Runtime>,
        launches: Launches,
        variants: &Variants,
    ) -> Result<Self, Error> {
        let function = |kernel| function(problem, runtime, &launches, kernel);
        let functions = launches.kernels.iter().map(function).collect::<Result<Vec<_>, Error>>()?;
        let store = NumberStore::new(problem, &runtime.device, &runtime.kernels)
            .map_err(|error| failure(NAME, "compiling a kernel", error))?;
        let mut parameters = ProblemParameters::new(problem);
        let of_calls = parameters.of_calls();
        // Both fit in 32 bits: there are at most `MOST_WARPS` splits, or one for `KEYS_PER_SPLIT` keys, and a
        // group has at most `MOST_POSITIONS` heads.
        (of_calls.pack_gqa, of_calls.splits) = (launches.pack_gqa as i32, launches.splits as i32);
        of_calls.forward_tiles = launches.forward_tiles as i32;
        // Parts of an infinity are NaN. And whether a call hides keys depends on its lengths, which must not
        // decide how rows that are not finite are computed.
        if problem.batch_invariant() || launches.kernels.iter().any(|kernel| kernel.tiles.tf32_split) {
            of_calls.check_results();
        }
        let counters = |kernel: &Kernel| {
            let names = std::iter::once(kernel.variant(&launches)).chain(kernel.axes(&launches));
            names.map(|name| variants.counter(&name)).collect()
        };
        let runs = launches.kernels.iter().map(counters).collect();
        let has_one_pass = launches.kernels.iter().any(|kernel| kernel.entry_point == ALL_GRADIENTS);
        let (problem, runtime) = (problem.clone(), runtime.clone());
        Ok(Self { problem, runtime, launches, parameters, store, functions, runs, has_one_pass })
    }

    /// Launches the kernels on an admitted call's tensors.
    ///
    /// # Safety
    /// `problem` is a call of the plan's problem, `tensors` has the addresses of its tensors, and
    /// [`Plan::admit`] has accepted the scratch for it. All of it is valid until the work on the device's
    /// stream is done.
    unsafe fn launch(
        &self,
        problem: &CallProblem<'_>,
        tensors: &Addresses,
        mut scratch: Scratch<'_>,
    ) -> Result<(), Error> {
        let base = scratch.as_mut_ptr() as u64;
        let stream = self.runtime.device.stream();
        tensors.check_streams(NAME, stream, base)?;
        let numbers = base + self.launches.numbers.start as u64;
        // SAFETY: the caller promised that the scratch was admitted, so it has the plan's size and alignment.
        // The range of numbers in it was made for this problem, begins at a multiple of 8, and is used for
        // nothing else.
        unsafe { self.store.store(stream, problem, numbers) }
            .map_err(|error| failure(NAME, "storing lengths on the device", error))?;
        let mut parameters = self.parameters.of_call(problem, numbers);
        if let Some(addresses) = self.launches.scratch.addresses(base) {
            parameters.set_scratch(addresses);
        }
        parameters.set_all(tensors);
        parameters.schedule = base + self.launches.schedule.start as u64;
        // The kernel for the gradient of queries sums far rows, and leaves the gradient to the one that has all.
        let of_far_rows = self.has_one_pass.then(|| {
            parameters.set_query_tiles(self.launches.one_pass.addresses(base));
            parameters.without_gradient_of_queries()
        });
        for ((kernel, function), runs) in self.launches.kernels.iter().zip(&self.functions).zip(&self.runs) {
            let config = kernel.launch_config();
            let own = of_far_rows.as_ref().filter(|_| kernel.entry_point == "attention_gradient_of_queries");
            let parameters = own.unwrap_or(&parameters);
            // SAFETY: every kernel takes this one struct. The caller promised that its tensors are those of
            // the problem, and that the scratch was admitted, so it has the plan's size. Kernels stay inside
            // the shapes that the struct gives: they clamp the lengths, offsets, starts and pages that they
            // read on the device. A kernel is launched early where the device can, and where all of its
            // threads wait for the kernels before it in front of their first access to memory, which
            // `waits` says of the source.
            unsafe {
                if kernel.waits() && self.runtime.launches_early {
                    launch_programmatic(stream, function, parameters, config)
                } else {
                    launch(stream, function, parameters, config)
                }
            }
            .map_err(|error| failure(NAME, "running a kernel", error))?;
            runs.iter().for_each(VariantCounter::count);
        }
        Ok(())
    }
}

/// A kernel of a problem, compiled and ready to be launched.
fn function(
    problem: &Problem,
    runtime: &Runtime,
    launches: &Launches,
    kernel: &Kernel,
) -> Result<CudaFunction, Error> {
    let most = runtime.machine.shared_bytes;
    if kernel.shared_bytes > most {
        let why = format!("a block has at most {most} bytes on this device");
        return Err(limit("a kernel with shared memory of", kernel.shared_bytes, why).into());
    }
    let variant = launches.compiled_as(problem, kernel);
    let function = runtime
        .kernels
        .named(runtime.device.context(), kernel.source, variant, kernel.entry_point)
        .map_err(|error| failure(NAME, "compiling a kernel", error))?;
    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // At most what the device says that a block may have, an int.
    function
        .set_attribute(attribute, kernel.shared_bytes as i32)
        .map_err(|error| failure(NAME, "reserving shared memory", error))?;
    Ok(function)
}

impl Plan for ChunkedCudaPlan {
    fn backend(&self) -> &str {
        NAME
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        self.launches.scratch_bytes()
    }

    fn lend_scratch(&self) -> Result<Box<dyn LentScratch + '_>, Error> {
        let Runtime { workspaces, device, .. } = &*self.runtime;
        workspaces.lend(NAME, device, self.scratch_bytes())
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (problem, inputs, mut outputs) = call.into_parts();
        // SAFETY: `admit` checked that the call is of this plan's problem, so its tensors are those that the
        // problem describes, and it checked the scratch. Both stay valid until the work is done: tensors of
        // attention-cuda are freed and written on the device's stream only, which `launch` checks, and who
        // makes views of other memory promises it, as the documentation of `ChunkedCudaBackend` asks.
        unsafe { self.launch(&problem, &Addresses::of_forward(&inputs, &mut outputs), scratch) }
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (problem, inputs, saved, mut outputs) = call.into_parts();
        // SAFETY: `admit` checked that the call is of this plan's problem, so its tensors are those that the
        // problem describes, and it checked the scratch. Both stay valid until the work is done: tensors of
        // attention-cuda are freed and written on the device's stream only, which `launch` checks, and who
        // makes views of other memory promises it, as the documentation of `ChunkedCudaBackend` asks.
        unsafe { self.launch(&problem, &Addresses::of_backward(&inputs, &saved, &mut outputs), scratch) }
    }
}
