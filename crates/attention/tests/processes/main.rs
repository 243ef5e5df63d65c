//! Calls where the process is the matter: without threads, without memory, after a fork, on a small stack,
//! and while a thread ends. Each runs in a process of its own: this test binary once more, asked for one test
//! by name.
#![cfg(all(unix, any(feature = "cpu", feature = "chunked")))]

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use attention::{Attention, CallProblem, Dimensions, Problem, Registry};

/// Set in a child, which does what its parent checks.
const CHILD: &str = "ATTENTION_TEST_CHILD";

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs the test `name` of this binary in a child with these variables, after a line of shell that sets
/// limits.
fn child(name: &str, limits: &str, variables: &[(&str, &str)]) -> Output {
    let this = std::env::current_exe().unwrap();
    let line = format!("{limits} exec \"$0\" \"$@\"");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &line]).arg(this).args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(CHILD, "1").env_remove("RUST_BACKTRACE").envs(variables.iter().copied());
    command.output().unwrap()
}

/// Checks that a child did well, and said so: a test that was not found would end well too. Gives what it
/// printed.
fn succeeds(name: &str, limits: &str, variables: &[(&str, &str)]) -> String {
    let output = child(name, limits, variables);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && out.contains("done here"),
        "{name}, {limits:?}: {}\n{out}\n{err}",
        output.status
    );
    out.into_owned()
}

fn done() {
    println!("done here");
}

/// What the calls here have: enough work for several threads.
const SHAPE: [usize; 4] = [2, 600, 4, 16];

fn data() -> Vec<f32> {
    (0..SHAPE.iter().product::<usize>()).map(|i| ((i * 29) % 31) as f32 / 16.0 - 1.0).collect()
}

/// Forward and backward on an implementation, as bits.
fn bits(name: &'static str) -> Result<Vec<u32>, attention::Error> {
    let x = data();
    let x = (&x, SHAPE);
    let call = Attention::new().causal(true).implementation(name);
    let forward = call.forward_with_lse(x, x, x)?;
    let backward = call.backward(x, x, x, &forward, x)?;
    let mut bits = Vec::new();
    for tensor in
        [Some(forward.out), Some(forward.lse), backward.dq, backward.dk, backward.dv].into_iter().flatten()
    {
        bits.extend(tensor.as_slice::<f32>().unwrap().iter().map(|x| x.to_bits()));
    }
    Ok(bits)
}

fn implementations() -> Vec<&'static str> {
    let all = [("cpu", cfg!(feature = "cpu")), ("chunked", cfg!(feature = "chunked"))];
    all.into_iter().filter_map(|(name, is_built)| is_built.then_some(name)).collect()
}

fn problem() -> Problem {
    let [batch, length, heads, head_dim] = SHAPE;
    let dims = Dimensions {
        batch,
        query_length: length,
        key_length: length,
        query_heads: heads,
        key_heads: heads,
        head_dim,
        value_head_dim: head_dim,
    };
    dims.problem(attention::DType::F32).causal(true).build().unwrap()
}

/// A line for each implementation, which says its bits here.
fn lines_of_bits() -> Vec<String> {
    let line = |name| {
        let bits = bits(name).unwrap();
        let sum = bits.iter().fold(0u64, |sum, &bits| sum.wrapping_mul(31).wrapping_add(bits.into()));
        format!("{name} {sum:x}")
    };
    implementations().into_iter().map(line).collect()
}

/// Limits this process to `count` threads with its first one, as a user of its own whose processes are
/// counted; whether it could become that user.
fn limit_threads(count: libc::rlim_t) -> bool {
    let user = 50_000 + std::process::id() % 10_000;
    // SAFETY: these calls take numbers and a pointer to `limit`, which lives here; they change the user and a
    // limit of this process, which runs this one test.
    let is_limited = unsafe {
        let limit = libc::rlimit { rlim_cur: count, rlim_max: count };
        // A user without other processes; without the right to become one, the limit may count this user's.
        libc::setgid(user);
        libc::setuid(user);
        libc::setrlimit(libc::RLIMIT_NPROC, &limit) == 0
    };
    assert!(is_limited);
    // SAFETY: `getuid` takes nothing and returns a number.
    unsafe { libc::getuid() == user }
}

/// The threads, of at most `wanted`, that can be made beside those that run.
fn threads_to_be_made(wanted: usize) -> usize {
    let (end, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    std::thread::scope(|scope| {
        // Each waits, in turn, for the sender to be gone.
        let begin = || {
            std::thread::Builder::new().spawn_scoped(scope, || wait.lock().unwrap().recv().is_err()).is_ok()
        };
        let made = (0..wanted).take_while(|_| begin()).count();
        drop(end);
        made
    })
}

/// Checks that a child, limited in threads, has the bits of this process with threads.
fn same_bits_in_a_child(name: &str, threads: &str) {
    let out = succeeds(name, "", &[("RAYON_NUM_THREADS", threads)]);
    for line in lines_of_bits() {
        assert!(out.contains(&line), "{line}: {out}");
    }
}

/// As many threads as one process may have: none beside its first.
#[test]
fn calls_run_where_no_thread_can_be_made() {
    if is_child() {
        limit_threads(1);
        assert_eq!(threads_to_be_made(1), 0, "the limit holds");
        lines_of_bits().iter().for_each(|line| println!("{line}"));
        done();
        return;
    }
    same_bits_in_a_child("calls_run_where_no_thread_can_be_made", "4");
}

/// Some of the threads that a pool is to have, and no more. A limit of processes, not of memory: where the
/// address space runs out, the standard library ends the process from within any thread that starts then.
#[test]
fn calls_run_where_not_all_threads_can_be_made() {
    if is_child() {
        let is_alone = limit_threads(4);
        let made = threads_to_be_made(8);
        assert!(made < 8 && (made > 0 || !is_alone), "{made} threads could be made");
        lines_of_bits().iter().for_each(|line| println!("{line}"));
        done();
        return;
    }
    same_bits_in_a_child("calls_run_where_not_all_threads_can_be_made", "8");
}

/// No pool is started by a question, by a call for one thread, or by one with a single task.
#[test]
#[cfg(target_os = "linux")]
fn what_needs_no_pool_starts_none() {
    fn threads() -> usize {
        std::fs::read_dir("/proc/self/task").unwrap().count()
    }
    if is_child() {
        let before = threads();
        let problem = problem();
        let explanation = attention::explain(&problem);
        assert!(explanation.choice.is_some());
        // Those of CUDA devices refuse a call on host memory.
        for backend in Registry::default().backends() {
            if backend.capabilities().device != attention::DeviceKind::Cpu {
                continue;
            }
            backend.supports(&problem).unwrap();
            assert!(backend.scratch_bytes(&problem).unwrap() > 0);
        }
        assert_eq!(threads(), before, "threads after questions");
        // One row of one head: a single task.
        let x = [1f32; 16];
        for name in implementations() {
            let call = Attention::new().implementation(name);
            let x = (&x, [1, 1, 1, 16]);
            let forward = call.forward_with_lse(x, x, x).unwrap();
            assert_eq!(threads(), before, "threads after {name} forward with one task");
            call.backward(x, x, x, &forward, x).unwrap();
            assert_eq!(threads(), before, "threads after {name} backward with one task");
        }
        // And the pool is there once a call has work for it.
        for name in implementations() {
            bits(name).unwrap();
        }
        assert!(threads() > before, "no pool for work for many");
        done();
        return;
    }
    succeeds("what_needs_no_pool_starts_none", "", &[("RAYON_NUM_THREADS", "3")]);
}

/// Runs `work` in a child of a fork, which must end well within the time.
fn forked(what: &str, work: impl FnOnce() -> bool) {
    // SAFETY: the child runs `work` and exits at once without returning; glibc keeps the allocator usable
    // after a fork.
    match unsafe { libc::fork() } {
        0 => {
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(false);
            // SAFETY: `_exit` takes a number and ends the child without running anything else in it.
            unsafe { libc::_exit(if good { 0 } else { 1 }) }
        }
        child => {
            assert!(child > 0, "{what}: no fork");
            let begin = Instant::now();
            let mut status = 0;
            // SAFETY: `child` is the process made above, which has not been waited for, and `status` lives
            // here.
            unsafe {
                while libc::waitpid(child, &mut status, libc::WNOHANG) == 0 {
                    if begin.elapsed() > Duration::from_secs(60) {
                        libc::kill(child, libc::SIGKILL);
                        libc::waitpid(child, &mut status, 0);
                        panic!("{what}: the child of the fork did not end");
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{what}: status {status}");
        }
    }
}

#[test]
fn a_child_of_a_fork_makes_calls() {
    if is_child() {
        let names = implementations();
        let want: Vec<_> = names.iter().map(|name| bits(name).unwrap()).collect();
        let same = || {
            names
                .iter()
                .zip(&want)
                .all(|(name, want)| (0..3).all(|_| bits(name).is_ok_and(|bits| bits == *want)))
        };
        forked("after calls with threads", || {
            let good = same();
            // And in a child of the child.
            forked("twice", same);
            good
        });
        // The parent goes on, and children of several threads.
        assert!(same());
        forked("with threads of the child's own", || {
            std::thread::scope(|scope| {
                let all: Vec<_> = (0..3).map(|_| scope.spawn(same)).collect();
                all.into_iter().all(|thread| thread.join().unwrap_or(false))
            })
        });
        done();
        return;
    }
    succeeds("a_child_of_a_fork_makes_calls", "", &[("RAYON_NUM_THREADS", "3")]);
}

/// The pool was somebody else's in the parent, and this library first asks for it in the child.
#[test]
fn a_child_of_a_fork_makes_its_first_call() {
    if is_child() {
        rayon::broadcast(|_| ());
        forked("a pool that is not this library's", || {
            implementations().iter().all(|name| bits(name).is_ok())
        });
        done();
        return;
    }
    succeeds("a_child_of_a_fork_makes_its_first_call", "", &[("RAYON_NUM_THREADS", "3")]);
}

/// Memory runs out: an error, or a result, and no abort.
#[test]
fn without_memory_a_call_is_an_error() {
    if is_child() {
        // More than the limit leaves, in outputs, in scratch, and in a mask of dropout.
        let desc = |length| {
            attention::TensorDesc::strided(attention::DType::F32, [1, length, 1, 1], [0; 4]).unwrap()
        };
        let x = [1f32];
        let view = |shape: [usize; 4]| attention::View::strided(&x, 0, shape, [0; 4]).unwrap();
        for name in implementations() {
            let (query, key) = (view([1, 1 << 20, 1, 64]), view([1, 1, 1, 64]));
            let call = Attention::new().implementation(name);
            let text = call.forward(query, key, key).unwrap_err().to_string();
            assert!(text.starts_with("no memory for a tensor"), "{name}: {text}");
        }
        // `cpu` holds the logits of a block of rows over all keys.
        if cfg!(feature = "cpu") {
            let (query, key) = (view([1, 64, 1, 1]), view([1, 1 << 21, 1, 1]));
            let call = Attention::new().implementation("cpu");
            let text = call.forward(query, key, key).unwrap_err().to_string();
            assert!(text.starts_with("no memory for scratch"), "{text}");
        }
        let problem = Problem::builder(desc(1 << 15), desc(1 << 15), desc(1 << 15)).dropout_rate(0.5);
        let problem = problem.build().unwrap();
        let dropout = problem.dropout_at(1, 0);
        let data = attention::CallData { dropout, ..Default::default() };
        assert!(attention::dropout_mask(&CallProblem::new(&problem, &data).unwrap()).is_err());
        done();
        return;
    }
    succeeds("without_memory_a_call_is_an_error", "ulimit -v 200000 &&", &[("RAYON_NUM_THREADS", "1")]);
}

/// Lets this process's address space grow by at most `bytes` from here on.
#[cfg(target_os = "linux")]
fn leave_memory(bytes: libc::rlim_t) {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: libc::rlim_t = pages.split(' ').next().unwrap().parse().unwrap();
    // SAFETY: `sysconf` takes a number; `setrlimit` takes a pointer to a limit that lives until it returns,
    // and changes a limit of this process, which runs this one test.
    let is_set = unsafe {
        let most = pages * libc::sysconf(libc::_SC_PAGESIZE) as libc::rlim_t + bytes;
        libc::setrlimit(libc::RLIMIT_AS, &libc::rlimit { rlim_cur: most, rlim_max: most }) == 0
    };
    assert!(is_set);
}

/// A large batch takes no memory of its own: lists of tasks, of some 70 bytes a batch row, ran out at this
/// limit.
#[test]
#[cfg(target_os = "linux")]
fn a_large_batch_takes_no_memory_beside_tensors_and_scratch() {
    if is_child() {
        const BATCH: usize = 200_000;
        let x = vec![half::bf16::ONE; BATCH];
        let mut out = vec![half::bf16::ZERO; BATCH];
        leave_memory(8 << 20);
        let shape = [BATCH, 1, 1, 1];
        for name in implementations() {
            let x = (&x, shape);
            Attention::new().implementation(name).forward_into(x, x, x, (&mut out, shape), None).unwrap();
            assert!(out.iter().all(|&out| out == half::bf16::ONE));
            out.fill(half::bf16::ZERO);
        }
        done();
        return;
    }
    let name = "a_large_batch_takes_no_memory_beside_tensors_and_scratch";
    succeeds(name, "", &[("RAYON_NUM_THREADS", "1")]);
}

/// An empty batch, whatever its size, and questions about a large one.
#[test]
fn nothing_is_computed_at_once() {
    let none: [f32; 0] = [];
    for name in implementations() {
        for batch in [1 << 30, 1 << 60] {
            let (begin, x) = (Instant::now(), (&none, [batch, 0, 1, 1]));
            let call = Attention::new().implementation(name);
            let forward = call.forward_with_lse(x, x, x).unwrap();
            call.backward(x, x, x, &forward, x).unwrap();
            assert!(begin.elapsed() < Duration::from_millis(500), "{name} {batch} {:?}", begin.elapsed());
        }
    }
    let dims = Dimensions { batch: 1 << 24, query_length: 1, key_length: 1, ..problem().dims() };
    let begin = Instant::now();
    attention::explain(&dims.problem(attention::DType::F32).build().unwrap());
    assert!(begin.elapsed() < Duration::from_millis(500), "explain {:?}", begin.elapsed());
    // Lengths are read, and no more.
    let lengths = vec![1; 1 << 20];
    let x = attention::View::from_slice(&[1f32], [1, 1, 1, 1]).unwrap().expand([1 << 20, 1, 1, 1]).unwrap();
    let begin = Instant::now();
    Attention::new().causal(true).key_value_lengths(lengths).explain(x, x, x).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20), "explain with lengths {:?}", begin.elapsed());
}

/// A value whose destructor makes a call, made before the thread's first call: the facade's own thread-local
/// is gone then.
#[test]
fn a_call_in_the_destructor_of_a_thread_local_runs() {
    use std::sync::mpsc::{Sender, channel};

    struct Last(Sender<Vec<Vec<u32>>>);

    impl Drop for Last {
        fn drop(&mut self) {
            let all = implementations().iter().map(|name| bits(name).unwrap()).collect();
            let _ = self.0.send(all);
        }
    }

    thread_local! {
        static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) };
    }

    let want: Vec<_> = implementations().iter().map(|name| bits(name).unwrap()).collect();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        LAST.with(|last| *last.borrow_mut() = Some(Last(sender)));
        for name in implementations() {
            bits(name).unwrap();
        }
    })
    .join()
    .unwrap();
    assert!(receiver.recv().expect("the destructor made its calls") == want);
}

/// The stack that a call must do with: 64 KiB, of which 54 are used at AVX2 with debug assertions. Frames at
/// AVX-512 and AMX have not been measured, so there it is twice as much.
fn small_stack() -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return 128 << 10;
    }
    64 << 10
}

/// Kernels keep what they work on in scratch, not on the stack. With debug assertions, too, whose frames are
/// larger.
#[test]
fn calls_run_on_a_small_stack() {
    if is_child() {
        let names = implementations();
        let want: Vec<_> = names.iter().map(|name| bits(name).unwrap()).collect();
        std::thread::Builder::new()
            .stack_size(small_stack())
            .spawn(move || {
                for (name, want) in names.iter().zip(&want) {
                    assert!(bits(name).is_ok_and(|bits| bits == *want), "{name}");
                }
            })
            .unwrap()
            .join()
            .unwrap();
        done();
        return;
    }
    for threads in ["1", "3"] {
        succeeds("calls_run_on_a_small_stack", "", &[("RAYON_NUM_THREADS", threads)]);
    }
}
