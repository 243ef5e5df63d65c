//! What a problem takes: the kernels of its calls with their grids, and scratch.

use std::ops::Range;

use attention_core::{Gradients, Pass, Problem, Role, RowLayout, Unsupported};
use attention_cuda::StoredNumbers;
use attention_cuda::cudarc::driver::LaunchConfig;
use attention_cuda::parameters::{ScratchAddresses, dtype_code};
use attention_kernels::{DTypeCode, Fused, KEYS_PER_SPLIT, KeyGradients, Layout, Variant};

use super::axes::axes;
use super::features::{bias_dtype, layout_of, term_stride};
use super::limits::limit;
use super::one_pass::{ALL_GRADIENTS, FINISH, OnePassScratch, wants_one_pass};
use super::rows::Rows;
use super::schedule::{
    SCHEDULE, blocks_for, has_room, most_entries, name_of_schedule, place_of, schedule_of,
};
use super::splits::{blocks_at_once, most_splits, splits_by_waves};
use super::tiles::{MOST_HEAD, Machine, Shape, Tiles};
use super::variants::{ONE_GRADIENT, SPLIT_KEYS, variant, variant_batch_invariant};

/// Blocks that keep a device busy, of batch-invariant calls: two for each multiprocessor of a large one.
/// Splits that have blocks of their own do so where there are fewer. A constant, since the scratch of a
/// problem must not depend on the device.
const BUSY_BLOCKS: usize = 264;

/// Bytes of partial outputs of a batch-invariant call, at most, where each of its splits has blocks of its
/// own: above, one block goes over all keys, as where there are blocks enough. The bits are the same.
const MOST_BYTES_OF_SPLITS: usize = 256 << 20;

/// Sequences are at most this long: positions are 32 bits wide, and tiles reach beyond the end.
const MOST_POSITIONS: usize = (1 << 31) - (1 << 16);

/// Bytes of a number that is stored on the device.
const NUMBER: usize = size_of::<i64>();

/// Columns of a row that a warp merges.
const MERGED_COLUMNS: usize = 32;

/// A kernel to launch.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) source: &'static str,
    pub(crate) entry_point: &'static str,
    pub(crate) tiles: Tiles,
    pub(crate) gradients: KeyGradients,
    pub(crate) blocks: u32,
    pub(crate) shared_bytes: usize,
}

impl Kernel {
    /// Its name among the backend's [`variants`].
    pub(crate) fn variant(&self, launches: &Launches) -> String {
        let more = match self.entry_point {
            "attention_forward" if launches.splits > 1 => SPLIT_KEYS,
            "attention_gradient_of_keys" if self.gradients != KeyGradients::KeyAndValue => ONE_GRADIENT,
            _ => "",
        };
        if self.source == SCHEDULE {
            return name_of_schedule(self.entry_point);
        }
        if launches.shape.batch_invariant && self.is_another_batch_invariant() {
            return variant_batch_invariant(
                self.entry_point,
                launches.shape.dtype,
                self.tiles,
                more,
                launches.layout,
            );
        }
        variant(self.entry_point, launches.shape, self.tiles, more, launches.layout)
    }

    /// Its names by what tiles do not say, which are among the backend's [`variants`] too.
    pub(crate) fn axes(&self, launches: &Launches) -> Vec<String> {
        if self.source == SCHEDULE {
            return Vec::new();
        }
        axes(self.entry_point, launches.shape, launches.shape.features, self.tiles, launches.layout)
    }

    /// Whether the kernel is compiled otherwise for batch-invariant calls.
    fn is_another_batch_invariant(&self) -> bool {
        ["attention_forward", "attention_merge", "attention_prepare_gradients"].contains(&self.entry_point)
    }

    /// Whether its threads wait for the kernels before it (`wait_for_earlier_kernels`), so that it may be
    /// launched before these are done.
    pub(crate) fn waits(&self) -> bool {
        self.entry_point == "attention_merge"
    }

    /// How it is launched. Its threads, and the bound that it is compiled with, are both those of
    /// [`block_threads`](attention_kernels::block_threads).
    pub(crate) fn launch_config(&self) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (self.blocks, 1, 1),
            block_dim: (self.tiles.threads() as u32, 1, 1),
            shared_mem_bytes: self.shared_bytes as u32,
        }
    }
}

/// Kernels in the order in which they run, and scratch.
#[derive(Clone, Debug)]
pub(crate) struct Launches {
    pub(crate) shape: Shape,
    pub(crate) layout: Layout,
    pub(crate) kernels: Vec<Kernel>,
    /// Query heads whose rows share tiles (pack GQA).
    pub(crate) pack_gqa: usize,
    /// Splits of the keys (split-KV).
    pub(crate) splits: usize,
    /// Tiles of the forward kernel, where its blocks go over several.
    pub(crate) forward_tiles: u32,
    pub(crate) scratch: ScratchLayout,
    /// Where the tiles of packed rows are listed for the next kernel, behind the arrays of the pass.
    pub(crate) schedule: Range<usize>,
    /// Scratch of the kernel for all three gradients, behind those.
    pub(crate) one_pass: OnePassScratch,
    /// Where the numbers of calls that are stored on the device ([`StoredNumbers`]) are, behind all of these.
    pub(crate) numbers: Range<usize>,
}

/// Where the arrays of a pass are in its scratch, in bytes: those of [`ScratchAddresses`] of the same name.
#[derive(Clone, Debug)]
pub(crate) enum ScratchLayout {
    None,
    Partials { out: Range<usize>, state: Range<usize> },
    Rows { offsets: Range<usize>, deltas: Range<usize> },
}

impl ScratchLayout {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Partials { state: last, .. } | Self::Rows { deltas: last, .. } => last.end,
        }
    }

    /// The addresses in scratch that begins at `base`.
    pub(crate) fn addresses(&self, base: u64) -> Option<ScratchAddresses> {
        let at = |range: &Range<usize>| base + range.start as u64;
        match self {
            Self::None => None,
            Self::Partials { out, state } => {
                Some(ScratchAddresses::Partials { out: at(out), state: at(state) })
            }
            Self::Rows { offsets, deltas } => {
                Some(ScratchAddresses::Rows { offsets: at(offsets), deltas: at(deltas) })
            }
        }
    }
}

impl Launches {
    /// For a problem that the capabilities allow, on such a device. Scratch does not depend on that.
    pub(crate) fn of(problem: &Problem, machine: Machine) -> Result<Self, Unsupported> {
        let dims = problem.dims();
        let shape = Shape::of(problem).ok_or_else(|| {
            limit(
                "head dimension",
                dims.head_dim.max(dims.value_head_dim),
                format!("it takes at most {MOST_HEAD}"),
            )
        })?;
        let (queries, keys) = (Rows::of_queries(problem), Rows::of_keys(problem));
        let (pages, page_size) = match problem.key_layout() {
            RowLayout::Paged { page_size } => {
                (problem.tensor(Role::Key).map_or(0, |key| key.shape()[0]), page_size)
            }
            _ => (0, 0),
        };
        for (what, size) in [
            ("query length", dims.query_length),
            ("key length", dims.key_length),
            ("query heads", dims.query_heads),
            ("key/value heads", dims.key_heads),
            ("packed query rows", queries.packed.unwrap_or(0)),
            ("packed keys", keys.packed.unwrap_or(0)),
            ("sequences", if problem.key_layout() == RowLayout::Dense { 0 } else { dims.batch }),
            ("pages", pages),
            ("rows of a page", page_size),
        ] {
            if size > MOST_POSITIONS {
                return Err(limit(what, size, format!("it takes at most {MOST_POSITIONS}")));
            }
        }
        let none = Self {
            shape,
            layout: layout_of(problem),
            kernels: Vec::new(),
            pack_gqa: 1,
            splits: 1,
            forward_tiles: 0,
            scratch: ScratchLayout::None,
            schedule: 0..0,
            one_pass: OnePassScratch::default(),
            numbers: 0..0,
        };
        match problem.pass() {
            Pass::Forward => none.forward(problem, machine),
            Pass::Backward => none.backward(problem, machine),
        }?
        .with_numbers(problem)
    }

    /// Adds scratch for the numbers of calls.
    fn with_numbers(mut self, problem: &Problem) -> Result<Self, Unsupported> {
        let place = || {
            let bytes = StoredNumbers::of(problem).bytes()?;
            let start = self.scratch_bytes().checked_next_multiple_of(NUMBER)?;
            Some(start..start.checked_add(bytes)?)
        };
        let place = place().ok_or_else(|| {
            limit(
                "batch rows",
                problem.dims().batch,
                "scratch for their numbers does not fit an address space",
            )
        })?;
        if !place.is_empty() {
            self.numbers = place;
        }
        Ok(self)
    }

    /// Bytes of scratch.
    pub(crate) fn scratch_bytes(&self) -> usize {
        self.scratch.bytes().max(self.schedule.end).max(self.one_pass.end()).max(self.numbers.end)
    }

    /// The ranges of two arrays of accumulators with these axes, one behind the other.
    fn two_arrays(&self, axes: [&[usize]; 2]) -> Result<[Range<usize>; 2], Unsupported> {
        let size = self.shape.dtype.accumulator().size();
        let bytes = |of: &[usize]| of.iter().try_fold(size, |bytes, &axis| bytes.checked_mul(axis));
        let ranges = || {
            let first = bytes(axes[0])?;
            let start = first.checked_next_multiple_of(64)?;
            Some([0..first, start..start.checked_add(bytes(axes[1])?)?])
        };
        ranges().ok_or_else(|| {
            limit("the sizes", format!("{axes:?}"), "scratch for them does not fit an address space")
        })
    }

    fn add(&mut self, kernel: Kernel, blocks: &[usize]) -> Result<(), Unsupported> {
        let count = blocks.iter().try_fold(1usize, |count, &axis| count.checked_mul(axis));
        let blocks = count.and_then(|count| i32::try_from(count).ok()).ok_or_else(|| {
            limit("a grid of blocks", format!("{blocks:?}"), "a kernel has fewer than 2^31 in all")
        })?;
        if blocks > 0 {
            self.kernels.push(Kernel { blocks: blocks.unsigned_abs(), ..kernel });
        }
        Ok(())
    }

    /// Sets scratch aside for the longest schedule of the pass (`most_entries`), of the lowest tiles there are
    /// on any device, since scratch must not depend on it.
    fn set_schedule(&mut self, of: &[(Rows, usize, usize)]) -> Result<(), Unsupported> {
        if self.layout == Layout::Packed {
            let entries = most_entries(self.shape.lowest_tile(), of);
            self.schedule = place_of(entries, self.scratch.bytes()).ok_or_else(|| {
                limit("tiles of packed rows", entries, "scratch for them does not fit an address space")
            })?;
        }
        Ok(())
    }

    /// Adds a kernel whose blocks have a tile of packed rows of some head each, behind one that lists them.
    fn add_scheduled(
        &mut self,
        kernel: Kernel,
        height: usize,
        entries: [usize; 2],
        blocks: &[usize],
    ) -> Result<(), Unsupported> {
        if self.layout == Layout::Packed {
            let (tiles, count) = (Tiles::of_schedule(height), entries[0].saturating_mul(entries[1]));
            if !has_room(&self.schedule, count) {
                let lowest = self.shape.lowest_tile();
                return Err(limit("tiles of rows", height, format!("scratch is for at least {lowest}")));
            }
            let entry_point = schedule_of(kernel.entry_point);
            let gradients = KeyGradients::None;
            let list = Kernel { source: SCHEDULE, entry_point, tiles, gradients, blocks: 0, shared_bytes: 0 };
            self.add(list, &[blocks_for(count, tiles)])?;
        }
        self.add(kernel, &[&entries[..], blocks].concat())
    }

    fn forward(mut self, problem: &Problem, machine: Machine) -> Result<Self, Unsupported> {
        let dims = problem.dims();
        let queries = Rows::of_queries(problem);
        let group = dims.group_size();
        let typical = queries.typical();
        let nominal_rows = self.shape.nominal_rows(typical);
        // The rows of a group's heads go over the same keys, and share tiles that they would not fill alone.
        let shares = typical < nominal_rows
            && (typical * group).div_ceil(nominal_rows) < group * typical.div_ceil(nominal_rows)
            && queries.packed.is_none_or(|rows| rows.saturating_mul(group) <= MOST_POSITIONS);
        let batch_invariant = self.shape.batch_invariant;
        // Whether rows share tiles decides which keys beside their own their tile has, so it must not depend
        // on how many rows there are.
        if shares || batch_invariant {
            self.pack_gqa = group.max(1);
        }
        let most_rows = queries.packed.unwrap_or(queries.longest());
        if batch_invariant && most_rows.saturating_mul(self.pack_gqa) > MOST_POSITIONS {
            let why = format!(
                "a group of {group} query heads has at most {MOST_POSITIONS} in batch-invariant calls"
            );
            return Err(limit("query rows", most_rows, why));
        }
        let rows_of_head = queries.longest() * self.pack_gqa;
        let tiles = self.shape.forward(rows_of_head, machine);
        let heads = dims.query_heads / self.pack_gqa.max(1);
        let blocks =
            queries.typical_tiles(self.shape.nominal_rows(rows_of_head), self.pack_gqa).saturating_mul(heads);
        let slices = self.shape.slices();
        // Numbers of a row of partial outputs, and row max and row sum, of every slice where each may have
        // its own: `partial_width` and `partial_state` of the kernels.
        let (width, states) = match batch_invariant {
            true => (dims.value_head_dim.next_multiple_of(2), 2 * slices),
            false => (dims.value_head_dim, 2),
        };
        // Splits that scratch has room for; and whether there is such scratch.
        let mut room = 1;
        let has_partials;
        if batch_invariant {
            let splits = dims.key_length.div_ceil(KEYS_PER_SPLIT);
            let numbers = [splits, dims.query_heads, queries.count(), width + states];
            let size = self.shape.dtype.accumulator().size();
            let bytes = numbers.into_iter().fold(size, usize::saturating_mul);
            has_partials = blocks > 0 && splits > 1;
            if has_partials && blocks < BUSY_BLOCKS && bytes <= MOST_BYTES_OF_SPLITS {
                self.splits = splits;
                room = splits;
            }
        } else {
            room = most_splits(self.shape, rows_of_head, blocks, dims.key_length);
            has_partials = room > 1;
            let key_tiles = dims.key_length.div_ceil(tiles.keys);
            self.splits =
                splits_by_waves(blocks, key_tiles, blocks_at_once(self.shape, tiles, machine), room);
        }
        if has_partials {
            let rows = [room, dims.query_heads, queries.count()];
            let of_row = |numbers: usize| [&rows[..], &[numbers]].concat();
            let [out, state] = self.two_arrays([&of_row(width), &of_row(states)])?;
            self.scratch = ScratchLayout::Partials { out, state };
        }
        self.set_schedule(&[(queries, self.pack_gqa, heads)])?;
        let kernel = Kernel {
            source: "attention_forward.cu",
            entry_point: "attention_forward",
            tiles,
            gradients: KeyGradients::None,
            blocks: 0,
            shared_bytes: self.shape.forward_bytes(tiles),
        };
        let entries = [queries.tiles(tiles.rows, self.pack_gqa), heads];
        self.add_scheduled(kernel.clone(), tiles.rows, entries, &[self.splits, slices])?;
        let is_forward = |last: &&mut Kernel| tiles.warpgroups && last.entry_point == kernel.entry_point;
        if let Some(forward) = self.kernels.last_mut().filter(is_forward) {
            self.forward_tiles = forward.blocks;
            // As many as run at once: each goes over the tiles that are its own.
            forward.blocks = forward.blocks.min(u32::try_from(machine.multiprocessors).unwrap_or(u32::MAX));
        }
        if self.splits > 1 {
            let rows = dims.query_heads.saturating_mul(queries.count());
            let tiles = Tiles::of_merge(tiles, batch_invariant);
            let merge = Kernel {
                source: "attention_merge.cu",
                entry_point: "attention_merge",
                tiles,
                shared_bytes: 0,
                ..kernel
            };
            let pieces = slices * self.shape.columns_of_slice().div_ceil(MERGED_COLUMNS);
            self.add(merge, &[rows.saturating_mul(pieces).div_ceil(tiles.warps)])?;
        }
        Ok(self)
    }

    fn backward(mut self, problem: &Problem, machine: Machine) -> Result<Self, Unsupported> {
        let dims = problem.dims();
        let (queries, keys) = (Rows::of_queries(problem), Rows::of_keys(problem));
        let rows = [dims.query_heads, queries.count()];
        // Offsets; row terms, scores and, per sequence and head, whether it has a far row
        // (kernels/src/cuda/fused/backward/gradients.cuh).
        let of_deltas = [dims.query_heads, queries.count().saturating_mul(2).saturating_add(dims.batch)];
        let [offsets, deltas] = self.two_arrays([&rows, &of_deltas])?;
        self.scratch = ScratchLayout::Rows { offsets, deltas };
        self.set_schedule(&[(queries, 1, dims.query_heads), (keys, 1, dims.key_heads)])?;
        let wants = |gradient| problem.gradients().contains(gradient);
        let kernel = Kernel {
            source: "attention_backward_rows.cu",
            entry_point: "attention_prepare_gradients",
            tiles: Tiles::of_rows(),
            gradients: KeyGradients::None,
            blocks: 0,
            shared_bytes: 0,
        };
        let row_count = rows.into_iter().fold(1, usize::saturating_mul);
        self.add(
            kernel.clone(),
            &[row_count.div_ceil(kernel.tiles.threads() / self.shape.threads_to_a_row())],
        )?;
        // First, since it leaves the sums of rows with a large logsumexp for the others: where the gradient
        // is not wanted, that is all that it does.
        let tiles = self.shape.queries(machine);
        let of_queries = Kernel {
            source: "attention_backward_queries.cu",
            entry_point: "attention_gradient_of_queries",
            tiles,
            shared_bytes: self.shape.queries_bytes(tiles),
            ..kernel.clone()
        };
        let entries = [queries.tiles(tiles.rows, 1), dims.query_heads];
        self.add_scheduled(of_queries, tiles.rows, entries, &[])?;
        if wants(Gradients::SINKS) {
            let sinks = Kernel { entry_point: "attention_gradient_of_sinks", ..kernel.clone() };
            self.add(sinks, &[dims.query_heads])?;
        }
        // The kernel in front sets its tickets to 0, and has no block where there are no rows.
        let one_pass = if row_count > 0 && wants_one_pass(self.shape, self.layout, problem) {
            self.one_pass =
                OnePassScratch::of(self.shape, problem, self.scratch.bytes().max(self.schedule.end))?;
            self.shape.one_pass(machine)
        } else {
            None
        };
        if let Some(tiles) = one_pass {
            self.add_one_pass(problem, tiles)?;
            return self.add_bias(problem, machine);
        }
        let passes: &[KeyGradients] = match (wants(Gradients::KEY), wants(Gradients::VALUE)) {
            (true, true) if self.shape.splits_gradients() => &[KeyGradients::Key, KeyGradients::Value],
            (true, true) => &[KeyGradients::KeyAndValue],
            (true, false) => &[KeyGradients::Key],
            (false, true) => &[KeyGradients::Value],
            (false, false) => &[],
        };
        for &gradients in passes {
            let tiles = self.shape.keys(machine);
            let of_keys = Kernel {
                source: "attention_backward_keys.cu",
                entry_point: "attention_gradient_of_keys",
                tiles,
                gradients,
                blocks: 0,
                shared_bytes: self.shape.keys_bytes(tiles),
            };
            let entries = [keys.tiles(tiles.keys, 1), dims.key_heads];
            self.add_scheduled(of_keys, tiles.keys, entries, &[])?;
        }
        self.add_bias(problem, machine)
    }

    /// Adds the kernel for all three gradients, and the one behind it.
    fn add_one_pass(&mut self, problem: &Problem, [tiles, of_finish]: [Tiles; 2]) -> Result<(), Unsupported> {
        let (keys, key_heads) = (Rows::of_keys(problem), problem.dims().key_heads);
        let kernel = Kernel {
            source: "attention_backward_one_pass.cu",
            entry_point: ALL_GRADIENTS,
            tiles,
            gradients: KeyGradients::KeyAndValue,
            blocks: 0,
            shared_bytes: self.shape.one_pass_bytes(tiles),
        };
        self.add_scheduled(kernel.clone(), tiles.keys, [keys.tiles(tiles.keys, 1), key_heads], &[])?;
        // Without keys, the kernel for the gradient of queries has it, which is zeros.
        if self.kernels.last().is_none_or(|last| last.entry_point != ALL_GRADIENTS) {
            return Ok(());
        }
        let finish = Kernel {
            source: "attention_backward_finish.cu",
            entry_point: FINISH,
            tiles: of_finish,
            gradients: KeyGradients::None,
            shared_bytes: 0,
            ..kernel
        };
        self.add(finish, &[self.one_pass.tiles.div_ceil(of_finish.warps)])
    }

    /// Adds the kernel for the gradient of the bias, where it is wanted.
    fn add_bias(mut self, problem: &Problem, machine: Machine) -> Result<Self, Unsupported> {
        let is_wanted = problem.gradients().contains(Gradients::BIAS);
        if let Some(bias) = problem.tensor(Role::Bias).filter(|_| is_wanted) {
            let tiles = self.shape.bias(machine);
            let of_bias = Kernel {
                source: "attention_backward_bias.cu",
                entry_point: "attention_gradient_of_bias",
                tiles,
                gradients: KeyGradients::None,
                blocks: 0,
                shared_bytes: self.shape.queries_bytes(tiles),
            };
            let shape = bias.shape();
            // What is summed over an axis is one tile wide there; an axis without elements has no tiles.
            self.add(
                of_bias,
                &[shape[3].div_ceil(tiles.keys), shape[2].div_ceil(tiles.rows), shape[1], shape[0]],
            )?;
        }
        Ok(self)
    }

    /// What a kernel is compiled with for this problem.
    pub(crate) fn compiled_as(&self, problem: &Problem, kernel: &Kernel) -> Variant {
        let Shape { dtype, head, features, eight_bit, .. } = self.shape;
        let Tiles { rows, keys, warps, stages, warpgroups, tf32_split } = kernel.tiles;
        if kernel.source == SCHEDULE {
            // What operands are makes no difference.
            let schedule = Fused::new(DTypeCode::F16, 32).tile(rows, keys).warps(warps).layout(self.layout);
            return Variant::Fused(schedule);
        }
        // The others have nothing that batch invariance changes.
        let of_sums = ["attention_forward.cu", "attention_merge.cu", "attention_backward_rows.cu"];
        let fused = Fused::new(dtype_code(dtype), kernel.tiles.columns(head))
            .value(kernel.tiles.columns(self.shape.columns_of_slice()))
            .slices(self.shape.slices())
            .features(features)
            .bias_dtype(bias_dtype(features, problem))
            .term_stride(term_stride(features, problem))
            .tile(rows, keys)
            .warps(warps)
            .warpgroups(warpgroups)
            .stages(stages)
            .gradients(kernel.gradients)
            .tf32_split(tf32_split)
            .layout(self.layout)
            .batch_invariant(self.shape.batch_invariant && of_sums.contains(&kernel.source))
            .eight_bit(eight_bit.map(dtype_code));
        Variant::Fused(fused)
    }
}
