#!/bin/sh
# candle: `flash_attn` on the CPU has ALiBi slopes of its own where the heads are no power of two, has none for a batch of one
# without a mask, and scales a mask that is there by them instead.
#
# Builds a program with candle-nn 0.11.1 in a temporary folder, and runs it without this project. Fails where the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/src"
cat > "$folder/Cargo.toml" <<'END'
[package]
name = "candle-alibi-slopes"
version = "0.0.0"
edition = "2024"

[dependencies]
candle-core = "=0.11.1"
candle-nn = "=0.11.1"

[workspace]
END
cat > "$folder/src/main.rs" <<'END'
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};

/// What slopes the second of two causal rows had, by head: the weight of key 0 beside that of its own is e^-slope.
fn slopes(batch: usize, heads: usize, mask: AttnMask) -> Result<Vec<f32>> {
    let zeros = Tensor::zeros((batch, 2, heads, 4), DType::F32, &Device::Cpu)?;
    // The value of key 0 is 1, that of key 1 is 0.
    let one = Tensor::ones((batch, 1, heads, 4), DType::F32, &Device::Cpu)?;
    let value = Tensor::cat(&[&one, &one.zeros_like()?], 1)?;
    let out = flash_attn::<f32>(&zeros, &zeros, &value, 1.0, mask, Some(8.0), None)?;
    let weights = out.narrow(0, 0, 1)?.narrow(2, 1, 1)?.narrow(3, 0, 1)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(weights.iter().map(|weight| ((1.0 - weight) / weight).ln()).collect())
}

fn near(slopes: &[f32], expected: &[f32]) -> bool {
    slopes.len() == expected.len() && slopes.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-5)
}

fn main() -> Result<()> {
    println!("candle-nn 0.11.1");
    let three = slopes(1, 3, AttnMask::causal())?;
    println!("3 heads, causal: {three:?}; the paper's are [0.0625, 0.00390625, 0.25]");
    assert!(near(&three, &[0.25, 0.0625, 0.015625]));
    let without = slopes(1, 3, AttnMask::None)?;
    println!("3 heads, no mask, a batch of one: {without:?}");
    assert!(near(&without, &[0.0, 0.0, 0.0]));
    let batch = slopes(2, 3, AttnMask::None)?;
    println!("3 heads, no mask, a batch of two: {batch:?}");
    assert!(near(&batch, &[0.25, 0.0625, 0.015625]));
    // A mask that takes 1 off the logit of key 0 takes the slope off.
    let mask = Tensor::new(&[[-1f32, 0.0], [-1.0, 0.0]], &Device::Cpu)?;
    let scaled = slopes(1, 3, AttnMask::Mask(mask))?;
    println!("3 heads, a mask of -1 for key 0: what was taken off is {scaled:?}");
    assert!(near(&scaled, &[0.25, 0.0625, 0.015625]));
    Ok(())
}
END
CARGO_TARGET_DIR="$folder/target" cargo run --quiet --manifest-path "$folder/Cargo.toml"
