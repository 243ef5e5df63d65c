//! Compiles with NVRTC, as `cargo xtask kernels` does. Where there is none, every test is ignored, and says
//! so.

use attention_cuda::Nvrtc;
use attention_kernels::Source;
use libtest_mimic::{Arguments, Trial};

const SOURCE: Source = Source {
    name: "test.cu",
    text: "extern \"C\" __global__ void fill(float *out) { out[threadIdx.x] = VALUE; }",
    entry_points: &["fill"],
    variants: &[],
};

fn main() {
    let missing = Nvrtc::open(&[]).err();
    if let Some(missing) = &missing {
        eprintln!("no NVRTC ({}); looked for {}", missing.what, missing.looked_for.join(", "));
    }
    let trial = |name: &str, run: fn(&Nvrtc)| {
        Trial::test(name, move || {
            let nvrtc = Nvrtc::open(&[]).map_err(|missing| format!("no NVRTC: {}", missing.what))?;
            run(&nvrtc);
            Ok(())
        })
        .with_kind(if missing.is_some() { "no NVRTC" } else { "" })
        .with_ignored_flag(missing.is_some())
    };
    let trials = vec![
        trial("defines_reach_the_compiler", defines_reach_the_compiler),
        trial("inline_assembly_is_checked_where_it_is_assembled", inline_assembly_is_checked),
        trial("what_does_not_compile_is_an_error_with_the_compilers_words", errors_have_the_compilers_words),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn defines_reach_the_compiler(nvrtc: &Nvrtc) {
    let compile =
        |define: &str| nvrtc.compile(&SOURCE, "compute_90", &[define.to_owned()]).expect("it compiles").ptx;
    let (one, two) = (compile("VALUE=1"), compile("VALUE=2"));
    assert!(one.contains(".entry fill("), "{one}");
    assert!(!one.contains('\0'));
    assert_ne!(one, two);
}

fn inline_assembly_is_checked(nvrtc: &Nvrtc) {
    let source =
        Source { text: "extern \"C\" __global__ void fill() { asm(\"no.such.instruction;\"); }", ..SOURCE };
    assert!(nvrtc.compile(&source, "compute_90", &[]).is_ok());
    let error = nvrtc.compile(&source, "sm_90", &[]).expect_err("there is no such instruction").to_string();
    assert!(error.contains("Not a name of any known instruction"), "{error}");
}

fn errors_have_the_compilers_words(nvrtc: &Nvrtc) {
    let error = nvrtc.compile(&SOURCE, "sm_90", &[]).expect_err("VALUE is not defined").to_string();
    assert!(error.starts_with("test.cu does not compile for sm_90: NVRTC_ERROR_COMPILATION\n"), "{error}");
    assert!(error.contains("identifier \"VALUE\" is undefined"), "{error}");

    let error = nvrtc
        .compile(&SOURCE, "sm_1", &["VALUE=1".to_owned()])
        .expect_err("no such architecture")
        .to_string();
    assert!(error.contains("invalid value for --gpu-architecture"), "{error}");

    let error =
        nvrtc.compile(&SOURCE, "sm_90", &["VALUE=\0".to_owned()]).expect_err("a zero byte").to_string();
    assert!(error.contains("a zero byte in"), "{error}");
}
