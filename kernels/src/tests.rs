//! Checks of the table of sources.

use std::collections::HashSet;

use super::*;

/// The declarations of the kernels of a source, up to their bodies, each on one line.
fn kernels(text: &str) -> impl Iterator<Item = String> {
    text.split("extern \"C\" __global__").skip(1).map(|after| {
        let declaration = after.split('{').next().unwrap_or(after);
        declaration.split_whitespace().collect::<Vec<_>>().join(" ")
    })
}

/// What is wrong with a table of sources.
fn faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    let (mut names, mut entry_points) = (HashSet::new(), HashSet::new());
    for source in sources {
        if !names.insert(source.name) {
            faults.push(format!("two sources are called {}", source.name));
        }
        if source.entry_points.is_empty() {
            faults.push(format!("{} has no entry point", source.name));
        }
        if source.variants.is_empty() {
            faults.push(format!("{} has no variant", source.name));
        }
        for (index, variant) in source.variants.iter().enumerate() {
            if source.variants[..index].contains(variant) {
                let defines = variant.defines().join(" ");
                faults.push(format!("{} lists the variant {defines} twice", source.name));
            }
        }
        for entry_point in source.entry_points {
            if !entry_points.insert(entry_point) {
                faults.push(format!("two entry points are called {entry_point}"));
            }
            if !kernels(source.text).any(|kernel| kernel.contains(&format!(" {entry_point}("))) {
                faults.push(format!("{} does not declare {entry_point}", source.name));
            }
        }
    }
    faults
}

#[test]
fn every_entry_point_is_in_its_source_and_no_name_is_taken_twice() {
    assert_eq!(faults(SOURCES), Vec::<String>::new());
}

/// Kernels that are declared without a bound on their threads that comes from the host's launch.
fn unbounded(text: &str) -> Vec<String> {
    let bounded =
        ["__launch_bounds__(BLOCK)", "__launch_bounds__(BLOCK, ", "__launch_bounds__(SUMMING_BLOCK)"];
    kernels(text).filter(|kernel| !bounded.iter().any(|bound| kernel.contains(bound))).collect()
}

#[test]
fn every_kernel_is_bounded_by_the_threads_it_is_launched_with() {
    for source in SOURCES {
        assert_eq!(unbounded(source.text), Vec::<String>::new(), "{}", source.name);
        for variant in source.variants {
            assert!(variant.defines().iter().any(|define| define.starts_with("BLOCK=")), "{}", source.name);
        }
    }
    let bound = "extern \"C\" __global__ void __launch_bounds__(THREADS, 1)\n    merge(int x) {";
    assert_eq!(unbounded(bound), ["void __launch_bounds__(THREADS, 1) merge(int x)"]);
}

/// Each file of a text says in its first comment which files it needs, and follows them.
#[test]
fn every_file_follows_those_that_it_needs() {
    let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
    let shared_files = read("fused.rs");
    let table =
        ["common", "cudnn", "forward", "backward"].map(|of| read(&format!("{of}_sources.rs"))).concat();
    let paths = |text: &str| -> Vec<String> {
        text.split('"').filter(|part| part.starts_with("cuda/")).map(str::to_owned).collect()
    };
    let (_, after) = shared_files.split_once("macro_rules! fused").unwrap();
    let shared = paths(after.split_once("};").unwrap().0);
    let mut seen = HashSet::new();
    for source in table.split("    text: ").skip(1) {
        let text = source.split_once("entry_points").unwrap().0;
        let own = paths(text);
        let files = if text.contains("fused!(") { [shared.clone(), own].concat() } else { own };
        for (index, file) in files.iter().enumerate() {
            let content = std::fs::read_to_string(folder.join(file)).unwrap();
            let comment = (content.lines().map_while(|line| line.strip_prefix("//")))
                .map(str::trim)
                .skip_while(|line| !line.starts_with("Needs: "))
                .take_while(|line| !line.is_empty())
                .collect::<Vec<_>>()
                .join(" ");
            let needs = comment.strip_prefix("Needs: ").and_then(|needs| needs.strip_suffix('.'));
            let needs = needs.unwrap_or_else(|| panic!("{file} does not say what it needs"));
            for needed in needs.split(", ").filter(|&needed| needed != "nothing") {
                let needed = format!("cuda/{needed}");
                assert!(files[..index].contains(&needed), "{file} comes before {needed}, which it needs");
            }
            seen.insert(file.clone());
        }
    }
    assert!(seen.len() > 30, "{seen:?}");
}

#[test]
fn the_check_finds_what_it_looks_for() {
    const SMALL: Variant = Variant::Helper(Helper { threads: 32, summing_threads: 64 });
    let text = "extern \"C\" __global__ void forward(float *out) {}";
    let good = Source { name: "a.cu", text, entry_points: &["forward"], variants: &[SMALL] };
    assert_eq!(faults(&[good]), Vec::<String>::new());
    let bad = [good, Source { entry_points: &["forward", "backward"], ..good }];
    assert_eq!(
        faults(&bad),
        [
            "two sources are called a.cu",
            "two entry points are called forward",
            "a.cu does not declare backward"
        ]
    );
    assert_eq!(faults(&[Source { entry_points: &[], ..good }]), ["a.cu has no entry point"]);
    assert_eq!(faults(&[Source { variants: &[], ..good }]), ["a.cu has no variant"]);
    let twice: &[Variant] = &[Variant::Helper(Helper::LAUNCHED), SMALL, SMALL];
    assert_eq!(
        faults(&[Source { variants: twice, ..good }]),
        ["a.cu lists the variant BLOCK=32 SUMMING_BLOCK=64 twice"]
    );
}
