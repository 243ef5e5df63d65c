//! The code paths that a call may choose, each with a count of its runs.
//!
//! A counter that is in a field here is one that is listed, so that a call cannot count what the list lacks.
//! The instruction set is no path: a machine has one, and every call runs at it. Neither are sizes that only
//! say how often a loop runs.

use attention_core::{DType, VariantCounter, Variants};

/// The counters of a backend, looked up once.
#[derive(Debug)]
pub(crate) struct Runs {
    variants: Variants,
    pub(crate) f64: OperandRuns,
    pub(crate) f32: OperandRuns,
    pub(crate) f32_in_f64: OperandRuns,
    pub(crate) f16: OperandRuns,
    pub(crate) bf16: OperandRuns,
    pub(crate) in_f32: ComputeRuns,
    pub(crate) in_f64: ComputeRuns,
    pub(crate) forward_task: ForwardTaskRuns,
    pub(crate) dbias_task: DBiasTaskRuns,
    pub(crate) bias: BiasRuns,
    pub(crate) mask: RowRuns,
    pub(crate) dbias_as: WrittenRuns,
    pub(crate) dsinks_as: WrittenRuns,
}

/// Of the code that is compiled for one [`Operand`](crate::operand::Operand).
#[derive(Debug)]
pub(crate) struct OperandRuns {
    pub(crate) forward: KeysRuns,
    pub(crate) backward: KeysRuns,
    /// Forward with keys and values of 8 bits, in the order of [`DType::EIGHT_BIT`].
    pub(crate) eight_bit: [KeysRuns; 2],
    /// The unpacked keys or values of a task are neighbours in the type that is computed in.
    pub(crate) read_in_place: VariantCounter,
    /// They are copied first: converted, or collected with a stride.
    pub(crate) read_copied: VariantCounter,
    /// The keys and values of a task are in several pages.
    pub(crate) pages: VariantCounter,
    /// A block of the backward pass has rows whose probabilities are made of their own sum.
    pub(crate) own_sum: VariantCounter,
    /// It has rows whose keys at hand are a part of the row, by the given logsumexp.
    pub(crate) given_lse: VariantCounter,
    pub(crate) dbias: DBiasRuns,
    /// A head has rows in one batch row whose sink weighs what the given logsumexp says.
    pub(crate) sink_by_lse: VariantCounter,
    /// It has rows whose sink weighs what their own sum says.
    pub(crate) sink_by_sum: VariantCounter,
}

/// How the tasks of a pass read keys and values.
#[derive(Debug)]
pub(crate) struct KeysRuns {
    pub(crate) unpacked: VariantCounter,
    pub(crate) packed: VariantCounter,
}

/// What the gradients of a block of logits are added to, by the last two axes of the bias.
#[derive(Debug)]
pub(crate) struct DBiasRuns {
    full: VariantCounter,
    rows: VariantCounter,
    keys: VariantCounter,
    one: VariantCounter,
}

impl DBiasRuns {
    /// For a bias that has these axes in full.
    pub(crate) fn of(&self, rows: bool, keys: bool) -> &VariantCounter {
        match (rows, keys) {
            (true, true) => &self.full,
            (true, false) => &self.rows,
            (false, true) => &self.keys,
            (false, false) => &self.one,
        }
    }
}

/// Of the code that is compiled for one [`Compute`](crate::elementary::Compute).
#[derive(Debug)]
pub(crate) struct ComputeRuns {
    /// Products of several rows with packed ones.
    pub(crate) product: VariantCounter,
    /// Products of one row, which `gemm` would sum in another order.
    pub(crate) product_of_row: VariantCounter,
    /// Keys or values that are kept apart because they are not finite.
    pub(crate) not_finite_keys: VariantCounter,
    /// Queries or output gradients that are.
    pub(crate) not_finite_rows: VariantCounter,
    /// Gradients of products are scaled before and after their sums.
    pub(crate) scaled_twice: VariantCounter,
}

/// How the query rows of a group of heads are cut into tasks of the forward pass.
#[derive(Debug)]
pub(crate) struct ForwardTaskRuns {
    pub(crate) heads: VariantCounter,
    pub(crate) head: VariantCounter,
    pub(crate) part_of_head: VariantCounter,
    /// The last rows of a head, few enough to leave the keys unpacked.
    pub(crate) end_of_head: VariantCounter,
}

/// Along which axes a task of the gradient of the bias has a part of its elements.
#[derive(Debug)]
pub(crate) struct DBiasTaskRuns {
    pub(crate) part_of_rows: VariantCounter,
    pub(crate) part_of_keys: VariantCounter,
}

/// How the bias is read, by its dtype.
#[derive(Debug)]
pub(crate) struct BiasRuns {
    pub(crate) f64: RowRuns,
    pub(crate) f64_in_f32: RowRuns,
    pub(crate) f32: RowRuns,
    pub(crate) f16: RowRuns,
    pub(crate) bf16: RowRuns,
}

/// How rows of a bias or mask lie, counted once a task.
#[derive(Debug)]
pub(crate) struct RowRuns {
    pub(crate) one_for_all_keys: VariantCounter,
    pub(crate) contiguous: VariantCounter,
    pub(crate) strided: VariantCounter,
}

/// As what a gradient is written.
#[derive(Debug)]
pub(crate) struct WrittenRuns {
    f64: VariantCounter,
    f32: VariantCounter,
    f16: VariantCounter,
    bf16: VariantCounter,
}

impl WrittenRuns {
    /// Counts a call that writes this dtype.
    pub(crate) fn count(&self, dtype: DType) {
        let counter = match dtype {
            DType::F64 => &self.f64,
            DType::F32 => &self.f32,
            DType::F16 => &self.f16,
            DType::Bf16 => &self.bf16,
            dtype => unreachable!("gradients are floats, got {dtype}"),
        };
        counter.count();
    }
}

impl Runs {
    /// With everything listed and nothing run.
    pub(crate) fn new() -> Self {
        let variants = Variants::default();
        let listed = |name: String| {
            variants.list([name.as_str()]);
            variants.counter(&name)
        };
        let operand = |operand: &str, reads_in_place: bool| {
            let keys = |pass: &str| KeysRuns {
                unpacked: listed(format!("{pass} {operand}, unpacked keys")),
                packed: listed(format!("{pass} {operand}, packed keys")),
            };
            let dbias = |axes: &str| listed(format!("dbias {operand}, {axes}"));
            OperandRuns {
                forward: keys("forward"),
                backward: keys("backward"),
                eight_bit: DType::EIGHT_BIT.map(|dtype| KeysRuns {
                    unpacked: listed(format!("forward {operand}, unpacked {dtype} keys")),
                    packed: listed(format!("forward {operand}, packed {dtype} keys")),
                }),
                read_in_place: match reads_in_place {
                    true => listed(format!("unpacked rows {operand}, in place")),
                    // Nothing that is converted can be read in place.
                    false => VariantCounter::default(),
                },
                read_copied: listed(format!("unpacked rows {operand}, copied")),
                pages: listed(format!("keys {operand}, in several pages")),
                own_sum: listed(format!("backward {operand}, rows by their own sum")),
                given_lse: listed(format!("backward {operand}, rows by the given logsumexp")),
                dbias: DBiasRuns {
                    full: dbias("[T, S]"),
                    rows: dbias("[T, 1]"),
                    keys: dbias("[1, S]"),
                    one: dbias("[1, 1]"),
                },
                sink_by_lse: listed(format!("dsinks {operand}, by the given logsumexp")),
                sink_by_sum: listed(format!("dsinks {operand}, by the row's own sum")),
            }
        };
        let compute = |compute: &str| ComputeRuns {
            product: listed(format!("product in {compute}, rows")),
            product_of_row: listed(format!("product in {compute}, one row")),
            not_finite_keys: listed(format!("sums in {compute}, keys or values not finite")),
            not_finite_rows: listed(format!("sums in {compute}, queries or output gradients not finite")),
            scaled_twice: listed(format!("backward in {compute}, scale in two factors")),
        };
        let rows = |of: &str| RowRuns {
            one_for_all_keys: listed(format!("{of}, one for all keys")),
            contiguous: listed(format!("{of}, contiguous rows")),
            strided: listed(format!("{of}, strided rows")),
        };
        let written = |of: &str| WrittenRuns {
            f64: listed(format!("{of} as f64")),
            f32: listed(format!("{of} as f32")),
            f16: listed(format!("{of} as f16")),
            bf16: listed(format!("{of} as bf16")),
        };
        Self {
            f64: operand("f64", true),
            f32: operand("f32", true),
            f32_in_f64: operand("f32 in f64", false),
            f16: operand("f16", false),
            bf16: operand("bf16", false),
            in_f32: compute("f32"),
            in_f64: compute("f64"),
            forward_task: ForwardTaskRuns {
                heads: listed("forward task, several heads".to_owned()),
                head: listed("forward task, one head".to_owned()),
                part_of_head: listed("forward task, part of a head".to_owned()),
                end_of_head: listed("forward task, part of a head, unpacked keys".to_owned()),
            },
            dbias_task: DBiasTaskRuns {
                part_of_rows: listed("dbias task, part of the rows".to_owned()),
                part_of_keys: listed("dbias task, part of the keys".to_owned()),
            },
            bias: BiasRuns {
                f64: rows("bias f64"),
                f64_in_f32: rows("bias f64 in f32"),
                f32: rows("bias f32"),
                f16: rows("bias f16"),
                bf16: rows("bias bf16"),
            },
            mask: rows("mask"),
            dbias_as: written("dbias"),
            dsinks_as: written("dsinks"),
            variants,
        }
    }

    /// The list, with the counts.
    pub(crate) fn variants(&self) -> &Variants {
        &self.variants
    }
}
