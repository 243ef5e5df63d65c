//! A sequence of a case alone, in a dense call.

use attention_core::{CallData, Element, Inputs, Scalar, View};
use attention_cpu::CpuBackend;

use super::case::Case;
use super::store::{Layout, Results, Store, both};

/// Both passes over sequence `batch` alone. Where dropout counts sequences, it is the last one of as many as
/// are before it, the others empty. Results are row-major, of this sequence alone.
pub(crate) fn alone<T: Scalar + Element, L: Scalar + Element>(
    backend: &CpuBackend,
    case: &Case<T, L>,
    batch: usize,
) -> Results<T, L> {
    let (before, rows, [n, k, h, hv]) = (case.before(batch), case.lengths[batch], case.heads);
    let operands = &case.operands[batch];
    let last = |shape: [usize; 3], elements: &[T]| {
        let [length, heads, width] = shape;
        let mut store = Store::new([before + 1, length, heads, width], Layout::Contiguous);
        store.write(before, elements);
        store
    };
    let query = last([rows.queries, n, h], &operands.query);
    let key = last([rows.used, k, h], &operands.key);
    let value = last([rows.used, k, hv], &operands.value);
    let d_out = last([rows.queries, n, hv], &operands.d_out);
    let mut d_lse = Store::<L>::new([before + 1, rows.queries, n], Layout::Contiguous);
    d_lse.write(before, &operands.d_lse);

    let lengths = |length: usize| [vec![0; before], vec![length as i32]].concat();
    let (query_lengths, key_lengths) = (lengths(rows.queries), lengths(rows.used));
    let mut data = CallData::default();
    if before > 0 {
        data.query_lengths = Some(View::from_slice(&query_lengths, [before + 1]).unwrap());
        data.key_value_lengths = Some(View::from_slice(&key_lengths, [before + 1]).unwrap());
    }
    let views = [&query, &key, &value].map(Store::view);
    let batches = batch - before..batch + 1;
    let inputs: Inputs<'_> = case.inputs(views, data, batches, Some([rows.queries, rows.used]));
    let d_lse = case.has_d_lse.then_some(&d_lse);
    let problem = case.problem(&inputs);
    let mut all = both(backend, inputs, &problem, Layout::Contiguous, (&d_out, d_lse), |_, _| ());
    for tensor in [&mut all.out, &mut all.dq, &mut all.dk, &mut all.dv] {
        *tensor = only(tensor, before);
    }
    all.lse = only(&all.lse, before);
    // Where the gradient of the bias has an axis of sequences, it has one element along it for each of
    // `batches`.
    all.dbias = all.dbias.map(|dbias| if dbias.shape[0] > 1 { only(&dbias, before) } else { dbias });
    all
}

/// One index of the first axis, which is left out of tensors of tokens and kept in others.
fn only<T: Scalar + Element>(store: &Store<T>, index: usize) -> Store<T> {
    let mut shape = store.shape;
    shape[0] = 1;
    Store::of(shape, Layout::Contiguous, &store.read(index, 1))
}
