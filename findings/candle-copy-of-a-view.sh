#!/bin/sh
# candle: `Tensor::copy` of a view on the CPU copies the whole storage behind it, so one row of a cache that is
# kept by `narrow(..).copy()` keeps a second cache. `contiguous` of such a row copies nothing, because the row is
# contiguous, and keeps the first one alive. `force_contiguous` alone gives a tensor of the row's size.
#
# Guess before the run: `copy` makes memory for the elements of the view, as `clone` does in torch and `copy` in
# NumPy.
#
# Builds a program with candle-core 0.11.1 in a temporary folder, and runs it without this project. Fails where
# the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/src"
cat > "$folder/Cargo.toml" <<'END'
[package]
name = "candle-copy-of-a-view"
version = "0.0.0"
edition = "2024"

[dependencies]
candle-core = "=0.11.1"

[workspace]
END
cat > "$folder/src/main.rs" <<'END'
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};

/// How many elements the memory behind a tensor has, and whether it is that of another one.
fn behind(tensor: &Tensor, other: &Tensor) -> (usize, bool) {
    let (storage, layout) = tensor.storage_and_layout();
    let (other, _) = other.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(own)), Storage::Cpu(CpuStorage::F32(other))) = (&*storage, &*other) else {
        unreachable!("tensors of f32 on the CPU")
    };
    assert_eq!(layout.shape().elem_count(), 1024);
    (own.len(), own.as_ptr() == other.as_ptr())
}

fn main() -> Result<()> {
    println!("candle-core 0.11.1");
    let cache = Tensor::zeros((1024, 1024), DType::F32, &Device::Cpu)?;
    let row = cache.narrow(0, 3, 1)?;
    let said = |name: &str, tensor: &Tensor| {
        let (elements, shared) = behind(tensor, &cache);
        println!("  {name}: {elements} elements behind it, shared with the cache: {shared}");
        (elements, shared)
    };
    println!("one row of 1024 elements, of a tensor of 1024 rows");
    assert_eq!(said("copy", &row.copy()?), (1 << 20, false));
    assert_eq!(said("contiguous", &row.contiguous()?), (1 << 20, true));
    assert_eq!(said("force_contiguous", &row.force_contiguous()?), (1024, false));
    Ok(())
}
END
CARGO_TARGET_DIR="$folder/target" cargo run --quiet --manifest-path "$folder/Cargo.toml"
