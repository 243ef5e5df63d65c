//! Causal self-attention of a million tokens, one head of dimension 64 in bf16, in memory that does not
//! depend on the length.
//!
//! ```text
//! cargo run --release -p attention-chunked --example million_tokens [TOKENS]
//! ```
//!
//! The queries are taken in pieces, each a call of its own with the offset of its first row, so that there is
//! progress to show; a row's result does not depend on the piece it is in. The offset is the call's, so one
//! plan serves all pieces of the same length. The scores alone would take 2 TB.

use std::error::Error;
use std::time::Instant;

use attention_chunked::ChunkedBackend;
use attention_core::{
    Alignment, AttentionBackend, ForwardCall, ForwardOutputs, Inputs, OffsetRange, QueryOffset,
    ScratchBuffer, View, ViewMut,
};
use half::bf16;
use indicatif::{ProgressBar, ProgressStyle};

const HEAD_DIM: usize = 64;
/// Query rows of a call.
const PIECE: usize = 1 << 13;

fn main() -> Result<(), Box<dyn Error>> {
    let tokens: usize = match std::env::args().nth(1) {
        Some(text) => text.parse().map_err(|error| format!("TOKENS '{text}': {error}"))?,
        None => 1 << 20,
    };
    if tokens == 0 {
        return Err("TOKENS must be above 0".into());
    }
    let backend = ChunkedBackend::new();
    backend.available()?;
    let level = backend.level().map_or("none", attention_chunked::Level::name);
    println!("{tokens} tokens at level {level}, {} threads", rayon::current_num_threads());

    // Reproducible numbers between -1 and 1.
    let number = |seed: u32| {
        move |index: usize| {
            let word = (index as u32 ^ seed).wrapping_mul(0x9e37_79b9);
            bf16::from_f32((word >> 8) as f32 / (1 << 23) as f32 - 1.0)
        }
    };
    let tensor = |seed: u32| (0..tokens * HEAD_DIM).map(number(seed)).collect::<Vec<bf16>>();
    let (query, key, value) = (tensor(1), tensor(2), tensor(3));
    let mut out = vec![bf16::NAN; tokens * HEAD_DIM];
    let key = View::from_slice(&key, [1, tokens, 1, HEAD_DIM])?;
    let value = View::from_slice(&value, [1, tokens, 1, HEAD_DIM])?;

    let style = ProgressStyle::with_template("{bar:40} {percent:>3} %  {elapsed}  {eta} left")?;
    let bar = ProgressBar::new((tokens as u64).pow(2)).with_style(style);
    let planned = |rows: usize| -> Result<_, Box<dyn Error>> {
        let query = View::from_slice(&query[..rows * HEAD_DIM], [1, rows, 1, HEAD_DIM])?;
        let problem = Inputs::new(query, key, value).problem().causal(true);
        Ok(backend.plan(&problem.alignment(Alignment::Offset(OffsetRange::Any)).build()?)?)
    };
    let piece = PIECE.min(tokens);
    let plan = planned(piece)?;
    let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
    let start = Instant::now();
    for (index, (query, out)) in
        query.chunks(piece * HEAD_DIM).zip(out.chunks_mut(piece * HEAD_DIM)).enumerate()
    {
        let (first, rows) = (index * piece, query.len() / HEAD_DIM);
        let plan = if rows == piece { plan.clone() } else { planned(rows)? };
        scratch.reserve(plan.scratch_bytes());
        let shape = [1, rows, 1, HEAD_DIM];
        let mut inputs = Inputs::new(View::from_slice(query, shape)?, key, value);
        inputs.data.query_offset = QueryOffset::Fixed(i64::try_from(first)?);
        let outputs = ForwardOutputs { out: ViewMut::from_slice(out, shape)?, lse: None };
        plan.forward(ForwardCall::new(plan.problem(), inputs, outputs)?, scratch.scratch())?;
        // Work grows with the square of what is done.
        bar.set_position(((first + rows) as u64).pow(2));
    }
    bar.finish();
    let seconds = start.elapsed().as_secs_f64();
    let flops = 2.0 * (tokens as f64).powi(2) * HEAD_DIM as f64;
    println!(
        "{seconds:.1} s, {:.0} GFLOP/s of useful work, {:.2} MiB of scratch",
        flops / seconds / 1e9,
        scratch.len() as f64 / f64::from(1 << 20)
    );
    if out.iter().any(|x| !x.is_finite()) {
        return Err("an output is not finite".into());
    }
    Ok(())
}
