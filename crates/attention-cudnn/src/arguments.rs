//! The arguments of the helper kernels: one struct per kernel, in the layout of the struct of the same name
//! in `attention_rows.cu`, `attention_terms.cu` or `attention_sequences.cu`, where the fields are explained.
//! Fields of type `u64` are addresses in the memory of the stream's device; 0 stands for null.

use attention_core::TensorDesc;
use attention_cuda::cudarc::driver::DeviceRepr;
use attention_cuda::parameters::Integers;

/// A struct that is the only argument of a kernel.
pub(crate) trait Arguments: DeviceRepr {
    /// The kernel.
    const KERNEL: HelperKernel;
}

/// The helper kernels, each by the name of its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HelperKernel {
    FinishForward,
    PrepareBackward,
    CleanRows,
    ClearGradients,
    ClearPacked,
    MakeBias,
    ToFloats,
    KeepMask,
    SinkGradient,
}

impl HelperKernel {
    /// How many there are.
    pub(crate) const COUNT: usize = HelperKernel::SinkGradient as usize + 1;

    /// The source and the entry point.
    pub(crate) fn place(self) -> (&'static str, &'static str) {
        match self {
            Self::FinishForward => (ROWS, "attention_finish_forward"),
            Self::PrepareBackward => (ROWS, "attention_prepare_backward"),
            Self::CleanRows => (ROWS, "attention_clean_rows"),
            Self::ClearGradients => (ROWS, "attention_clear_gradients"),
            Self::ClearPacked => (ROWS, "attention_clear_packed"),
            Self::MakeBias => (BIAS, "attention_make_bias"),
            Self::ToFloats => (BIAS, "attention_to_floats"),
            Self::KeepMask => (BIAS, "attention_keep_mask"),
            Self::SinkGradient => (BIAS, "attention_sink_gradient"),
        }
    }
}

/// The strides, in elements, of a tensor whose first axes are batch row, position and head.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RowStrides {
    pub(crate) batch: i64,
    pub(crate) position: i64,
    pub(crate) head: i64,
}

impl RowStrides {
    /// The strides of this tensor, or zeros if the call has none.
    pub(crate) fn of(desc: Option<&TensorDesc>) -> Self {
        let [batch, position, head] =
            std::array::from_fn(|axis| desc.map_or(0, |desc| desc.strides()[axis] as i64));
        Self { batch, position, head }
    }
}

/// An interval of rows or keys for each batch row: an array of them at address `of`, or, if `of` is 0, the
/// same `first..end` for all batch rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Intervals {
    pub(crate) of: u64,
    pub(crate) first: i32,
    pub(crate) end: i32,
}

impl Intervals {
    /// Every row or key: `i32::MAX` is at least any length that the backend takes.
    pub(crate) const ALL: Self = Self { of: 0, first: 0, end: i32::MAX };

    /// The array of intervals at address `of`, or `all` for every batch row if the address is 0.
    pub(crate) fn new(of: u64, all: std::ops::Range<usize>) -> Self {
        let place = |place: usize| i32::try_from(place).unwrap_or(i32::MAX);
        Self { of, first: place(all.start), end: place(all.end) }
    }
}

/// The address of where sequences begin among packed rows and the last one ends, `[B + 1]`; 0 if rows are
/// dense.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Starts {
    pub(crate) of: u64,
}

/// Which rows see at least one key: by structure (`intervals`) and, where there is a mask or a bias, by the
/// bytes at `flags`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct SeeingRows {
    pub(crate) intervals: Intervals,
    pub(crate) flags: u64,
    pub(crate) flag_heads: i64,
}

/// The argument of `attention_finish_forward`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct FinishForward {
    pub(crate) out: u64,
    pub(crate) out_strides: RowStrides,
    pub(crate) lse: u64,
    pub(crate) lse_strides: RowStrides,
    pub(crate) stats: u64,
    pub(crate) seeing: SeeingRows,
    pub(crate) sinks: u64,
    pub(crate) lengths: u64,
    pub(crate) starts: Starts,
    pub(crate) batch: i64,
    pub(crate) positions: i64,
    pub(crate) heads: i64,
    pub(crate) width: i64,
}

/// The argument of `attention_prepare_backward`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PrepareBackward {
    pub(crate) lse: u64,
    pub(crate) lse_strides: RowStrides,
    pub(crate) stats: u64,
    pub(crate) far_heads: u64,
    pub(crate) seeing: SeeingRows,
    pub(crate) starts: Starts,
    pub(crate) batch: i64,
    pub(crate) positions: i64,
    pub(crate) heads: i64,
}

/// The argument of `attention_clean_rows`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct CleanRows {
    pub(crate) from: u64,
    pub(crate) from_strides: RowStrides,
    pub(crate) to: u64,
    pub(crate) intervals: Intervals,
    pub(crate) flags: u64,
    pub(crate) flag_heads: i64,
    pub(crate) flag_row: i64,
    pub(crate) stats: u64,
    pub(crate) batch: i64,
    pub(crate) positions: i64,
    pub(crate) heads: i64,
    pub(crate) vectors: i64,
}

/// The argument of `attention_clear_gradients`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct ClearGradients {
    pub(crate) to: u64,
    pub(crate) to_strides: RowStrides,
    pub(crate) key_lengths: u64,
    pub(crate) batch: i64,
    pub(crate) positions: i64,
    pub(crate) heads: i64,
    pub(crate) vectors: i64,
}

/// The argument of `attention_clear_packed`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct ClearPacked {
    pub(crate) to: u64,
    pub(crate) to_strides: RowStrides,
    pub(crate) intervals: Intervals,
    pub(crate) starts: Starts,
    pub(crate) batch: i64,
    pub(crate) positions: i64,
    pub(crate) heads: i64,
    pub(crate) vectors: i64,
}

/// An array of ragged offsets, for rows that are `row` elements apart; the address is 0 for none.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct RaggedOffsets {
    pub(crate) to: u64,
    pub(crate) row: i64,
}

/// The second argument of `attention_sequences`; the first one is the `Parameters` of the fused kernels.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct SequenceArrays {
    pub(crate) query_lengths: u64,
    pub(crate) key_lengths: u64,
    pub(crate) rows: u64,
    pub(crate) keys: u64,
    pub(crate) offsets: u64,
    pub(crate) query_starts: u64,
    pub(crate) key_starts: u64,
    pub(crate) of_queries: [RaggedOffsets; 6],
    pub(crate) of_keys: [RaggedOffsets; 4],
}

/// Four strides, of batch, head, row and key: 0 along axes of size 1.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct LogitStrides {
    pub(crate) of: [i64; 4],
}

impl LogitStrides {
    /// The strides of a tensor that is broadcast to the logits, or zeros if the call has none.
    pub(crate) fn of(desc: Option<&TensorDesc>) -> Self {
        let stride =
            |axis: usize, desc: &TensorDesc| if desc.shape()[axis] == 1 { 0 } else { desc.strides()[axis] };
        Self { of: std::array::from_fn(|axis| desc.map_or(0, |desc| stride(axis, desc) as i64)) }
    }
}

/// The bias that `attention_make_bias` writes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct MadeBias {
    pub(crate) to: u64,
    pub(crate) batch: i64,
    pub(crate) heads: i64,
    pub(crate) positions: i64,
    pub(crate) keys: i64,
    pub(crate) row: i64,
    pub(crate) masked: f32,
    pub(crate) least: f32,
}

/// The tensors that `attention_make_bias` computes its bias from.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BiasSources {
    pub(crate) mask: u64,
    pub(crate) mask_strides: LogitStrides,
    pub(crate) bias: u64,
    pub(crate) bias_strides: LogitStrides,
    pub(crate) slopes: u64,
    pub(crate) slopes_batch: i64,
}

/// Which rows see which keys by structure: lengths, causal masking and windows.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Structure {
    pub(crate) rows: Intervals,
    pub(crate) keys: Intervals,
    pub(crate) offsets: u64,
    pub(crate) offset: i64,
    pub(crate) left: i64,
    pub(crate) right: i64,
}

/// Which rows see any key, and which keys any row sees: addresses of arrays of bytes, or 0 if
/// `attention_make_bias` does not run.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Seen {
    /// `[B, N, T]`.
    pub(crate) rows: u64,
    /// `[B, K, S]`, in rows that are as long as those of the bias.
    pub(crate) keys: u64,
}

/// The argument of `attention_make_bias`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct MakeBias {
    pub(crate) made: MadeBias,
    pub(crate) sources: BiasSources,
    pub(crate) structure: Structure,
    pub(crate) seen: Seen,
    pub(crate) made_dtype: i32,
    pub(crate) bias_dtype: i32,
    pub(crate) batch: i64,
    pub(crate) heads: i64,
    pub(crate) group: i64,
    pub(crate) positions: i64,
}

/// The argument of `attention_to_floats`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct ToFloats {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) rows: i64,
    pub(crate) columns: i64,
    pub(crate) row_stride: i64,
    pub(crate) column_stride: i64,
    pub(crate) dtype: i32,
    pub(crate) padding: u32,
}

/// The argument of `attention_keep_mask`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct KeepMask {
    pub(crate) to: u64,
    pub(crate) rows: i64,
    pub(crate) positions: i64,
    pub(crate) blocks: i64,
    pub(crate) seed: Integers,
    pub(crate) offset: Integers,
    pub(crate) one: u32,
    pub(crate) threshold: u32,
    pub(crate) key: [u32; 2],
    pub(crate) stream_offset: u32,
    pub(crate) padding: u32,
}

/// The argument of `attention_sink_gradient`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct SinkGradient {
    pub(crate) to: u64,
    pub(crate) to_stride: i64,
    pub(crate) sinks: u64,
    pub(crate) delta: u64,
    pub(crate) lse: u64,
    pub(crate) lse_strides: RowStrides,
    pub(crate) rows: Intervals,
    pub(crate) scores: u64,
    pub(crate) offsets: u64,
    pub(crate) batch: i64,
    pub(crate) heads: i64,
    pub(crate) positions: i64,
    pub(crate) far: f32,
    pub(crate) dtype: i32,
}

// Each struct has the layout of the kernels' struct of the same name: the size is asserted below and in the
// kernel's source, and the test `structs_are_laid_out_as_in_the_kernels` compares the offset of every field.

// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for FinishForward {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for PrepareBackward {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for CleanRows {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for ClearGradients {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for ClearPacked {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for SequenceArrays {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for MakeBias {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for ToFloats {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for KeepMask {}
// SAFETY: `repr(C)`, made of plain numbers without padding; the layout is the kernels' (asserted and tested).
unsafe impl DeviceRepr for SinkGradient {}

// The sizes that C++ gives the structs; each source of a kernel asserts the same number.
const _: () = assert!(size_of::<FinishForward>() == 160);
const _: () = assert!(size_of::<PrepareBackward>() == 112);
const _: () = assert!(size_of::<CleanRows>() == 120);
const _: () = assert!(size_of::<ClearGradients>() == 72);
const _: () = assert!(size_of::<ClearPacked>() == 88);
const _: () = assert!(size_of::<SequenceArrays>() == 216);
const _: () = assert!(size_of::<MakeBias>() == 272);
const _: () = assert!(size_of::<ToFloats>() == 56);
const _: () = assert!(size_of::<KeepMask>() == 104);
const _: () = assert!(size_of::<SinkGradient>() == 128);

impl Arguments for FinishForward {
    const KERNEL: HelperKernel = HelperKernel::FinishForward;
}

impl Arguments for PrepareBackward {
    const KERNEL: HelperKernel = HelperKernel::PrepareBackward;
}

impl Arguments for CleanRows {
    const KERNEL: HelperKernel = HelperKernel::CleanRows;
}

impl Arguments for ClearGradients {
    const KERNEL: HelperKernel = HelperKernel::ClearGradients;
}

impl Arguments for ClearPacked {
    const KERNEL: HelperKernel = HelperKernel::ClearPacked;
}

impl Arguments for MakeBias {
    const KERNEL: HelperKernel = HelperKernel::MakeBias;
}

impl Arguments for ToFloats {
    const KERNEL: HelperKernel = HelperKernel::ToFloats;
}

impl Arguments for KeepMask {
    const KERNEL: HelperKernel = HelperKernel::KeepMask;
}

impl Arguments for SinkGradient {
    const KERNEL: HelperKernel = HelperKernel::SinkGradient;
}

/// The source of the kernels on rows of tensors.
const ROWS: &str = "attention_rows.cu";
/// The source of the kernels for bias, dropout and sinks.
const BIAS: &str = "attention_terms.cu";
/// The source of the kernel that takes [`SequenceArrays`].
pub(crate) const SEQUENCES: &str = "attention_sequences.cu";

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The name of a field and its offset in bytes.
    type Field = (String, usize);

    /// The fields of a struct of a source with their offsets, and its size, as C++ lays it out.
    fn laid_out(text: &str, name: &str) -> (Vec<Field>, usize) {
        let (_, after) =
            text.split_once(&format!("struct {name} {{\n")).unwrap_or_else(|| panic!("no {name}"));
        let (body, _) = after.split_once("\n};").unwrap();
        let code: String = body.lines().map(|line| line.split("//").next().unwrap()).collect();
        let (mut fields, mut end, mut align) = (Vec::new(), 0_usize, 1);
        for declaration in code.split(';').map(str::trim).filter(|declaration| !declaration.is_empty()) {
            let declaration = declaration.strip_prefix("const ").unwrap_or(declaration);
            let numbers = [
                ("long long ", 8),
                ("unsigned char ", 1),
                ("unsigned short ", 2),
                ("unsigned ", 4),
                ("int ", 4),
            ];
            let numbers = numbers.iter().chain(&[("float ", 4), ("void ", 0), ("uint4 ", 16)]);
            let number = numbers.copied().find(|(kind, _)| declaration.starts_with(kind));
            let (names, (size, alignment)) = match number {
                Some((kind, size)) => (&declaration[kind.len()..], (size, size)),
                None => {
                    let (kind, names) = declaration.split_once(' ').unwrap();
                    (names, (laid_out(text, kind).1, 8))
                }
            };
            for field in names.split(',').map(str::trim) {
                let (field, size, alignment) = match field.strip_prefix('*') {
                    Some(pointer) => (pointer, 8, 8),
                    None => (field, size, alignment),
                };
                let (field, count) = match field.split_once('[') {
                    Some((field, count)) => (field, count.trim_end_matches(']').parse().unwrap()),
                    None => (field, 1),
                };
                end = end.next_multiple_of(alignment);
                fields.push((field.to_owned(), end));
                end += size * count;
                align = align.max(alignment);
            }
        }
        (fields, end.next_multiple_of(align))
    }

    /// Compares all fields of a struct with those of the kernels' struct of the same name.
    macro_rules! check {
        ($source:ident, $name:ident: $($field:ident),*) => {
            let text = attention_kernels::source($source).expect("it is in the package").text;
            let (mut fields, size) = laid_out(text, stringify!($name));
            assert_eq!(size, size_of::<$name>(), stringify!($name));
            let expected = [$((stringify!($field).to_owned(), offset_of!($name, $field))),*];
            // C++ pads the end of a struct by itself; the Rust struct names that padding.
            fields.extend(expected.last().filter(|(name, _)| name == "padding").cloned());
            assert_eq!(fields, expected, stringify!($name));
            // Does not compile unless every field is in the list.
            let _ = |$name { $($field: _),* }: $name| ();
        };
    }

    #[test]
    fn structs_are_laid_out_as_in_the_kernels() {
        check!(ROWS, RowStrides: batch, position, head);
        check!(ROWS, Intervals: of, first, end);
        check!(BIAS, Intervals: of, first, end);
        check!(ROWS, SeeingRows: intervals, flags, flag_heads);
        check!(
            ROWS, FinishForward: out, out_strides, lse, lse_strides, stats, seeing, sinks, lengths, starts,
            batch, positions, heads, width
        );
        check!(
            ROWS, PrepareBackward: lse, lse_strides, stats, far_heads, seeing, starts, batch, positions,
            heads
        );
        check!(
            ROWS, CleanRows: from, from_strides, to, intervals, flags, flag_heads, flag_row, stats, batch,
            positions, heads, vectors
        );
        check!(ROWS, ClearGradients: to, to_strides, key_lengths, batch, positions, heads, vectors);
        check!(ROWS, Starts: of);
        check!(ROWS, ClearPacked: to, to_strides, intervals, starts, batch, positions, heads, vectors);
        check!(SEQUENCES, RaggedOffsets: to, row);
        check!(
            SEQUENCES, SequenceArrays: query_lengths, key_lengths, rows, keys, offsets, query_starts, key_starts,
            of_queries, of_keys
        );
        check!(BIAS, RowStrides: batch, position, head);
        check!(BIAS, LogitStrides: of);
        check!(BIAS, MadeBias: to, batch, heads, positions, keys, row, masked, least);
        check!(
            BIAS, BiasSources: mask, mask_strides, bias, bias_strides, slopes, slopes_batch
        );
        check!(BIAS, Structure: rows, keys, offsets, offset, left, right);
        check!(BIAS, Seen: rows, keys);
        check!(
            BIAS, MakeBias: made, sources, structure, seen, made_dtype, bias_dtype, batch, heads, group,
            positions
        );
        check!(
            BIAS, ToFloats: to, from, rows, columns, row_stride, column_stride, dtype, padding
        );
        check!(
            BIAS, KeepMask: to, rows, positions, blocks, seed, offset, one, threshold, key, stream_offset, padding
        );
        check!(
            BIAS, SinkGradient: to, to_stride, sinks, delta, lse, lse_strides, rows, scores, offsets,
            batch, heads, positions, far, dtype
        );
    }

    #[test]
    fn the_check_computes_offsets_as_cpp_does() {
        let text = "struct Inner {\n    int a;\n    long long b[2];\n};\nstruct Outer {\n    // x; y\n    \
            const unsigned char *p, *q;\n    unsigned key[3];\n    Inner inner;\n    float last;\n};\n";
        let fields = [("p", 0), ("q", 8), ("key", 16), ("inner", 32), ("last", 56)];
        let fields = fields.map(|(name, offset)| (name.to_owned(), offset)).to_vec();
        assert_eq!(laid_out(text, "Inner"), (vec![("a".to_owned(), 0), ("b".to_owned(), 8)], 24));
        assert_eq!(laid_out(text, "Outer"), (fields, 64));
    }
}
