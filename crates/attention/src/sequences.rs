//! Packed and paged sequences: the axes of their tensors, and how long the longest is.

use attention_core::{CallData, Element, Inputs, InvalidCall, Role, View};

use crate::{AxisOrder, Options};

/// Whether queries or keys are packed or in pages.
pub(crate) fn has_sequences(data: &CallData<'_>) -> bool {
    data.query_starts.is_some() || data.key_value_starts.is_some() || data.block_table.is_some()
}

/// Checks the number of axes of query, key and value of a call with packed or paged sequences. A packed
/// tensor may have an axis of size 1 in front, as problems have it.
pub(crate) fn check_ranks(order: AxisOrder, inputs: &Inputs<'_>) -> Result<(), InvalidCall> {
    let data = &inputs.data;
    let heads_first = order == AxisOrder::Bnth;
    let query = match (data.query_starts.is_some(), heads_first) {
        (true, false) => (3..=4, "3 ([total, N, H]), as queries are packed"),
        (true, true) => (3..=4, "3 ([N, total, H]), as queries are packed"),
        (false, false) => (4..=4, "4 ([B, T, N, H]), or 3 ([total, N, H]) with `packed_queries`"),
        (false, true) => (4..=4, "4 ([B, N, T, H]), or 3 ([N, total, H]) with `packed_queries`"),
    };
    let keys = match (data.key_value_starts.is_some(), data.block_table.is_some(), heads_first) {
        (true, _, false) => (3..=4, "3 ([total, K, H or Hv]), as keys are packed"),
        (true, _, true) => (3..=4, "3 ([K, total, H or Hv]), as keys are packed"),
        (false, true, false) => (4..=4, "4 ([pages, page size, K, H or Hv]), as keys are in pages"),
        (false, true, true) => (4..=4, "4 ([pages, K, page size, H or Hv]), as keys are in pages"),
        (false, false, false) => (4..=4, "4 ([B, S, K, H or Hv]), or 3 ([total, K, H or Hv]) with `packed`"),
        (false, false, true) => (4..=4, "4 ([B, K, S, H or Hv]), or 3 ([K, total, H or Hv]) with `packed`"),
    };
    // Found here, since the sequences of a problem are counted by the table.
    if let Some(shape) = data.block_table.map(|table| table.shape()).filter(|shape| shape.rank() != 2) {
        let (role, rank, expected) = (Role::BlockTable, shape.rank(), "2 ([B, most])");
        return Err(InvalidCall::Rank { role, rank, shape, expected });
    }
    for (role, view, (ranks, expected)) in [
        (Role::Query, inputs.query, &query),
        (Role::Key, inputs.key, &keys),
        (Role::Value, inputs.value, &keys),
    ] {
        let shape = view.shape();
        // An axis in front of packed rows has size 1, as problems have it.
        let in_front = *ranks.start() == 3 && shape.rank() == 4 && shape[0] != 1;
        if !ranks.contains(&shape.rank()) || in_front {
            return Err(InvalidCall::Rank { role, rank: shape.rank(), shape, expected });
        }
    }
    Ok(())
}

/// How long packed sequences may be: what the options say, or what the offsets of this call do. `None` where
/// neither does, and where a mask or bias does. Of inputs with four axes in the order of the core.
pub(crate) fn longest(inputs: &Inputs<'_>, options: &Options) -> (Option<usize>, Option<usize>) {
    let data = &inputs.data;
    let found = |starts: Option<View<'_>>, tensor: &View<'_>, axis: usize| {
        let said = [inputs.mask, inputs.bias].into_iter().flatten().any(|view| {
            let aligned = (axis + view.shape().rank()).checked_sub(4);
            aligned.and_then(|axis| view.shape().get(axis).copied()).is_some_and(|size| size != 1)
        });
        let most = if said { None } else { longest_of(starts?) }?;
        let rows = tensor.shape().get(1).copied()?;
        // The next power of two, so that the plans of calls with other offsets are few.
        Some(most.checked_next_power_of_two().map_or(rows, |most| most.min(rows)))
    };
    (
        options.longest_query.or_else(|| found(data.query_starts, &inputs.query, 2)),
        options.longest_key.or_else(|| found(data.key_value_starts, &inputs.key, 3)),
    )
}

/// The most rows between two starts that follow each other; `None` where they are not a list of integers in
/// host memory. What is wrong with them is found where the call is checked.
fn longest_of(starts: View<'_>) -> Option<usize> {
    fn of<T: Element + bytemuck::Pod + TryInto<i64>>(starts: View<'_>) -> Option<usize> {
        let starts = starts.host::<T>()?.row(&[]);
        let start = |index| starts.at(index).try_into().unwrap_or(i64::MAX);
        let lengths = (1..starts.len()).map(|index| start(index).saturating_sub(start(index - 1)));
        Some(usize::try_from(lengths.max().unwrap_or(0)).unwrap_or(0))
    }
    let (shape, strides) = (starts.shape(), starts.desc().strides());
    match (shape.rank(), strides.first()) {
        // One number for all, however many there are.
        (1, Some(0)) => Some(0),
        (1, _) => of::<i32>(starts).or_else(|| of::<u32>(starts)).or_else(|| of::<i64>(starts)),
        _ => None,
    }
}
