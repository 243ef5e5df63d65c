#!/bin/sh
# candle: the output of `flash_attn_varlen_unfused` has no rows for a sequence without keys, so all rows
# behind it move up. `flash_attn_varlen_cpu`, which takes the same arguments, has rows of zeros there. Query
# rows behind the last sequence are dropped by the first function and refused by the second.
#
# Guess before the run: both give [total_q, heads, dim], with zeros for a sequence that has queries and no
# keys, since one is meant as the fallback of the other; and both treat rows that belong to no sequence alike.
#
# Builds a program with candle-nn 0.11.1 in a temporary folder, and runs it without this project. Fails where
# the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/src"
cat > "$folder/Cargo.toml" <<'END'
[package]
name = "candle-packed-rows-without-keys"
version = "0.0.0"
edition = "2024"

[dependencies]
candle-core = "=0.11.1"
candle-nn = "=0.11.1"

[workspace]
END
cat > "$folder/src/main.rs" <<'END'
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::attention::{flash_attn_varlen_cpu, flash_attn_varlen_unfused};

/// The first number of each row of the output. Key j of all keys has the value j + 1 and all logits are 0, so
/// a row is the mean of the values of its sequence.
fn rows(output: &Tensor) -> Result<Vec<f32>> {
    output.narrow(2, 0, 1)?.flatten_all()?.to_vec1()
}

/// What both functions give for `total` query rows, and the number of queries and of keys of each sequence.
fn both(total: usize, queries: &[u32], keys: &[u32]) -> Result<(Result<Tensor>, Result<Tensor>)> {
    let total_keys = keys.iter().sum::<u32>() as usize;
    let query = Tensor::zeros((total, 1, 4), DType::F32, &Device::Cpu)?;
    let key = Tensor::zeros((total_keys, 1, 4), DType::F32, &Device::Cpu)?;
    let value = (0..total_keys).flat_map(|j| [j as f32 + 1.0; 4]).collect::<Vec<_>>();
    let value = Tensor::from_vec(value, (total_keys, 1, 4), &Device::Cpu)?;
    let (queries, keys) = (Tensor::new(queries, &Device::Cpu)?, Tensor::new(keys, &Device::Cpu)?);
    let (q, k, v) = (&query, &key, &value);
    let fused = flash_attn_varlen_cpu(q, k, v, None, &queries, &keys, 2, 2, 1.0, false, None, None);
    let unfused = flash_attn_varlen_unfused(q, k, v, None, &queries, &keys, 2, 2, 1.0, false, None, None);
    Ok((fused, unfused))
}

fn main() -> Result<()> {
    println!("candle-nn 0.11.1");
    // Sequences of 2, 1 and 2 rows over 1, 0 and 2 keys.
    let (fused, unfused) = both(5, &[2, 1, 2], &[1, 0, 2])?;
    let (fused, unfused) = (fused?, unfused?);
    println!("2, 1 and 2 rows over 1, 0 and 2 keys");
    println!("  flash_attn_varlen_cpu: shape {:?}, rows {:?}", fused.dims(), rows(&fused)?);
    println!("  flash_attn_varlen_unfused: shape {:?}, rows {:?}", unfused.dims(), rows(&unfused)?);
    assert_eq!(rows(&fused)?, [1.0, 1.0, 0.0, 2.5, 2.5]);
    assert_eq!(rows(&unfused)?, [1.0, 1.0, 2.5, 2.5]);

    // One query row more than the sequences have.
    let (fused, unfused) = both(5, &[2, 2], &[1, 2])?;
    let unfused = unfused?;
    let refused = fused.is_err();
    println!("5 rows, of which two sequences have 4");
    println!("  flash_attn_varlen_cpu refuses: {refused}");
    println!("  flash_attn_varlen_unfused: shape {:?}", unfused.dims());
    assert!(refused);
    assert_eq!(unfused.dims(), [4, 1, 4]);
    Ok(())
}
END
CARGO_TARGET_DIR="$folder/target" cargo run --quiet --manifest-path "$folder/Cargo.toml"
