#!/bin/sh
# half: `bf16::from_f64` ignores the low 32 bits of the f64, so a number above the middle of two neighbours goes to the lower one.
#
# Builds a program with half 2.7.1 in a temporary folder, and runs it without this project. Fails where the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/src"
cat > "$folder/Cargo.toml" <<'END'
[package]
name = "half-from-f64"
version = "0.0.0"
edition = "2024"

[dependencies]
half = "=2.7.1"

[workspace]
END
cat > "$folder/src/main.rs" <<'END'
use half::bf16;

fn main() {
    println!("half 2.7.1");
    // bf16 has 8 bits: the neighbours of 1 + 2^-8 are 1 and 1 + 2^-7, and it is their middle. Anything above goes up.
    let above = 1.0 + 2f64.powi(-8) + 2f64.powi(-21);
    let (direct, nearest) = (bf16::from_f64(above).to_f64(), 1.0 + 2f64.powi(-7));
    println!("from_f64(1 + 2^-8 + 2^-21) = {direct}, the nearest is {nearest}");
    assert_eq!(direct, 1.0);
    // The same number is exact in f32, and from there it is rounded as it should be.
    assert_eq!(f64::from(above as f32), above);
    let through = bf16::from_f32(above as f32).to_f64();
    println!("from_f32 of the same number, which is exact in f32: {through}");
    assert_eq!(through, nearest);
}
END
CARGO_TARGET_DIR="$folder/target" cargo run --quiet --manifest-path "$folder/Cargo.toml"
