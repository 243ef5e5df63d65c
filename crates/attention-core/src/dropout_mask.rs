//! The keep bits of a whole call.

use crate::{CallProblem, OutOfMemory};

/// The keep mask of a call, `[B, N, T, S]` in row-major order, or `None` without dropout. Positions outside
/// the lengths have bits too; they are not used.
///
/// # Errors
/// [`OutOfMemory`] where the mask does not fit in memory: it has a byte for each element of the logits.
pub fn dropout_mask(problem: &CallProblem<'_>) -> Result<Option<Vec<bool>>, OutOfMemory> {
    let Some(stream) = problem.dropout_stream() else { return Ok(None) };
    let dims = problem.dims();
    // The problem checked that the logits can be counted.
    let count: usize = dims.logits().iter().product();
    let mut mask = Vec::new();
    if count == 0 {
        // Without keys there may be any number of rows.
        return Ok(Some(mask));
    }
    mask.try_reserve_exact(count).map_err(|_| OutOfMemory { what: "a dropout mask", bytes: count })?;
    for batch_head in 0..(dims.batch * dims.query_heads) as u32 {
        for t in 0..dims.query_length as u32 {
            stream.for_each(batch_head, t, 0..dims.key_length, |_, keep| mask.push(keep));
        }
    }
    Ok(Some(mask))
}
