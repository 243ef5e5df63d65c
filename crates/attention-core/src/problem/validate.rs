//! The checks of a problem: the only place where calls are judged.

use super::{Dimensions, Spec, eight_bit};
use crate::shape::element_count;
use crate::{Alignment, DType, Device, Dims, Dropout, Gradients, InvalidCall, Pass, Role, TensorDesc};

const ANY_FLOAT: &str = "f64, f32, f16 or bf16";

/// Checks a spec and fills in its defaults: then it is that of a problem, with what this gives.
pub(super) fn check(spec: &mut Spec) -> Result<(Dimensions, DType), InvalidCall> {
    spec.check_layouts()?;
    let (dims, dtype) = operands(spec)?;
    optional_inputs(spec, dims)?;
    dropout(spec, dims)?;
    numbers(spec, dims)?;
    let given = |role: &Role| *role < Role::Out || role.is_data();
    for (role, desc) in Role::every().zip(&spec.tensors).filter(|(role, _)| given(role)) {
        desc.as_ref().map_or(Ok(()), |desc| fits(role, desc))?;
    }
    results(spec, dims, dtype)?;
    Ok((dims, dtype))
}

/// Ranks, dtypes and shapes of query, key and value, and what follows from them.
fn operands(spec: &mut Spec) -> Result<(Dimensions, DType), InvalidCall> {
    let mut operand = |role: Role| {
        let given = spec.tensors[role as usize].ok_or(InvalidCall::Missing { role })?;
        let desc = spec.with_batch_axis(role, given);
        let packs = spec.packs(role);
        if desc.rank() != 4 || packs && desc.shape()[0] != 1 {
            let expected = if packs { "3" } else { "4" };
            return Err(InvalidCall::Rank { role, rank: given.rank(), shape: given.shape(), expected });
        }
        spec.tensors[role as usize] = Some(desc);
        Ok(desc)
    };
    let (query, key, value) = (operand(Role::Query)?, operand(Role::Key)?, operand(Role::Value)?);

    let dtype = query.dtype();
    if !dtype.is_supported_float() {
        return Err(InvalidCall::DType { role: Role::Query, dtype, expected: ANY_FLOAT.to_owned() });
    }
    eight_bit::dtypes(spec, dtype, key.dtype(), value.dtype())?;

    let [_, query_rows, query_heads, head_dim] = axes(&query);
    let [key_rows, keys_of_row, key_heads, _] = axes(&key);
    let value_head_dim = value.shape()[3];
    let batch = spec.batch();
    let (query_length, key_length) =
        (spec.bound_of_queries(query_rows), spec.bound_of_keys([key_rows, keys_of_row])?);
    let dims =
        Dimensions { batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim };
    for (role, desc) in [(Role::Query, query), (Role::Value, value)] {
        if desc.shape()[3] == 0 {
            return Err(InvalidCall::ZeroHeadDim { role, shape: desc.shape() });
        }
    }
    if !spec.packs(Role::Query) {
        // Not the batch of the query itself where a block table counts the sequences.
        let why = "[B, T, N, H]; B of the block table";
        expect_shape(Role::Query, &query, [batch, query_rows, query_heads, head_dim], why)?;
    }
    let is_dense = !spec.packs(Role::Key) && spec.tensors[Role::BlockTable as usize].is_none();
    let (rows, why) = if is_dense {
        let key = if spec.packs(Role::Query) {
            "[B, S, K, H]; B of the starts, H of the query"
        } else {
            "[B, S, K, H]; B and H of the query"
        };
        (batch, [key, "[B, S, K, Hv]; B, S and K of the key"])
    } else if spec.packs(Role::Key) {
        (1, ["[1, total, K, H]; H of the query", "[1, total, K, Hv]; total and K of the key"])
    } else {
        let why = "[pages, page size, K, Hv]; pages, page size and K of the key";
        (key_rows, ["[pages, page size, K, H]; H of the query", why])
    };
    expect_shape(Role::Key, &key, [rows, keys_of_row, key_heads, head_dim], why[0])?;
    expect_shape(Role::Value, &value, [rows, keys_of_row, key_heads, value_head_dim], why[1])?;
    if query_heads.checked_rem(key_heads).unwrap_or(query_heads) != 0 {
        return Err(InvalidCall::HeadsNotDivisible { query_heads, key_heads });
    }
    if !countable(&dims.logits()) {
        return Err(InvalidCall::Overflow { what: "the logits [B, N, T, S]", shape: dims.logits().into() });
    }
    Ok((dims, dtype))
}

/// Whether the elements can be counted, taking sizes of zero for one: backends may then multiply any of the
/// sizes without overflow, also where another axis makes the tensor empty.
fn countable(shape: &[usize]) -> bool {
    let mut sizes = Dims::from([1; 4]);
    for (size, &given) in sizes.iter_mut().zip(shape) {
        *size = given.max(1);
    }
    element_count(&sizes).is_some()
}

fn fits(role: Role, desc: &TensorDesc) -> Result<(), InvalidCall> {
    // A span says that the elements can be counted, where there are any.
    let fits = desc.span().is_some() && (!desc.is_empty() || countable(&desc.shape()));
    fits.then_some(()).ok_or(InvalidCall::Overflow { what: role.name(), shape: desc.shape() })
}

fn axes(desc: &TensorDesc) -> [usize; 4] {
    std::array::from_fn(|axis| desc.shape()[axis])
}

fn expect_shape(
    role: Role,
    desc: &TensorDesc,
    expected: impl Into<Dims>,
    why: &'static str,
) -> Result<(), InvalidCall> {
    let expected = expected.into();
    if desc.shape() == expected {
        return Ok(());
    }
    Err(InvalidCall::Shape { role, shape: desc.shape(), expected, why })
}

/// Mask, bias, slopes and sinks. Masks and biases are brought to rank 4.
fn optional_inputs(spec: &mut Spec, dims: Dimensions) -> Result<(), InvalidCall> {
    for role in [Role::Mask, Role::Bias] {
        if let Some(desc) = &mut spec.tensors[role as usize] {
            *desc = broadcast_to_logits(role, desc, dims)?;
        }
    }
    if let Some(desc) = spec.tensors[Role::Mask as usize].filter(|desc| desc.dtype() != DType::Bool) {
        let expected =
            "bool, true where a key takes part (an additive mask of floats is a bias: give it as one, or make booleans of \
             finite minimum values with `conventions`; numbers that say 1 or 0 are compared with 0 first)"
                .to_owned();
        return Err(InvalidCall::DType { role: Role::Mask, dtype: desc.dtype(), expected });
    }
    for role in [Role::Bias, Role::AlibiSlopes, Role::Sinks] {
        if let Some(desc) = spec.tensors[role as usize].filter(|desc| !desc.dtype().is_supported_float()) {
            return Err(InvalidCall::DType { role, dtype: desc.dtype(), expected: ANY_FLOAT.to_owned() });
        }
    }
    if let Some(slopes) = &spec.tensors[Role::AlibiSlopes as usize] {
        match slopes.rank() {
            1 => expect_shape(Role::AlibiSlopes, slopes, [dims.query_heads], "[N]")?,
            2 => expect_shape(Role::AlibiSlopes, slopes, [dims.batch, dims.query_heads], "[B, N]")?,
            rank => {
                let expected = "1 or 2";
                return Err(InvalidCall::Rank {
                    role: Role::AlibiSlopes,
                    rank,
                    shape: slopes.shape(),
                    expected,
                });
            }
        }
    }
    if let Some(sinks) = &spec.tensors[Role::Sinks as usize] {
        if sinks.rank() != 1 {
            let (rank, shape) = (sinks.rank(), sinks.shape());
            return Err(InvalidCall::Rank { role: Role::Sinks, rank, shape, expected: "1" });
        }
        expect_shape(Role::Sinks, sinks, [dims.query_heads], "[N]")?;
    }
    Ok(())
}

/// Checks that a mask or bias broadcasts to `[B, N, T, S]` and gives it four axes.
fn broadcast_to_logits(role: Role, desc: &TensorDesc, dims: Dimensions) -> Result<TensorDesc, InvalidCall> {
    let (rank, shape, strides) = (desc.rank(), desc.shape(), desc.strides());
    if rank == 0 {
        return Err(InvalidCall::Rank { role, rank, shape, expected: "1 to 4" });
    }
    let target = dims.logits();
    let (mut full_shape, mut full_strides) = ([1; 4], [0; 4]);
    for axis in 0..rank {
        let aligned = axis + 4 - rank;
        let (size, expected) = (shape[axis], target[aligned]);
        if size != 1 && size != expected {
            let (target, axes) = (target.into(), "[B, N, T, S]");
            return Err(InvalidCall::NotBroadcastable { role, shape, target, axes, axis, size, expected });
        }
        full_shape[aligned] = size;
        full_strides[aligned] = strides[axis];
    }
    Ok(TensorDesc::strided(desc.dtype(), full_shape, full_strides).expect("both have four axes"))
}

/// The tensors among the numbers of the calls.
fn numbers(spec: &mut Spec, dims: Dimensions) -> Result<(), InvalidCall> {
    // Host memory is the only one that a call on the host has, and other tensors are all on the problem's
    // device: so problems that do the same are equal.
    let in_host_memory = std::mem::take(&mut spec.in_host_memory);
    for role in Role::DATA.into_iter().chain(Role::SEQUENCES).chain(Role::SCALES) {
        let Some(desc) = spec.tensors[role as usize] else { continue };
        spec.in_host_memory.set(role, spec.device != Device::Cpu && in_host_memory.contains(role));
        if Role::SCALES.contains(&role) {
            spec.tensors[role as usize] = Some(eight_bit::scales(spec, role, desc, dims)?);
            continue;
        }
        if !desc.dtype().is_integer() {
            let expected = "i32, u32 or i64".to_owned();
            return Err(InvalidCall::DType { role, dtype: desc.dtype(), expected });
        }
        let rank = if role == Role::BlockTable { 2 } else { 1 };
        if desc.rank() != rank {
            let expected = if rank == 1 { "1" } else { "2" };
            return Err(InvalidCall::Rank { role, rank: desc.rank(), shape: desc.shape(), expected });
        }
        let batch = dims.batch;
        match role {
            Role::DropoutSeed | Role::DropoutOffset => expect_shape(role, &desc, [1], "[1]")?,
            Role::BlockTable => expect_shape(role, &desc, [batch, desc.shape()[1]], "[B, most pages]")?,
            // One start at least: no sequences have one too.
            Role::QueryStarts | Role::KeyValueStarts => {
                let packed = spec.tensors[Role::QueryStarts as usize].is_some();
                let of_queries = role == Role::KeyValueStarts && packed;
                let why = if of_queries { "[B + 1]; B of the query starts" } else { "[B + 1]" };
                expect_shape(role, &desc, [batch.saturating_add(1)], why)?;
            }
            _ => expect_shape(role, &desc, [batch], "[B]")?,
        }
    }
    let has = |role: Role| spec.tensors[role as usize].is_some();
    let by_row = matches!(spec.alignment, Alignment::Offsets(_));
    if by_row != has(Role::QueryOffsets) {
        let role = Role::QueryOffsets;
        return Err(if by_row { InvalidCall::Missing { role } } else { InvalidCall::Unexpected { role } });
    }
    for role in [Role::DropoutSeed, Role::DropoutOffset] {
        if has(role) && spec.dropout_rate.is_none() {
            return Err(InvalidCall::Unexpected { role });
        }
    }
    Ok(())
}

fn dropout(spec: &Spec, dims: Dimensions) -> Result<(), InvalidCall> {
    let Some(rate) = spec.dropout_rate else { return Ok(()) };
    Dropout::new(rate.get(), 0).stream()?;
    for (what, value) in [
        ("query rows T", dims.query_length),
        ("keys S", dims.key_length),
        ("batch rows times heads B*N", dims.batch * dims.query_heads),
    ] {
        if u32::try_from(value).is_err() {
            return Err(InvalidCall::DropoutCounter { what, value });
        }
    }
    Ok(())
}

/// Outputs of the pass, and what backward reads of the forward.
fn results(spec: &mut Spec, dims: Dimensions, dtype: DType) -> Result<(), InvalidCall> {
    let query = spec.tensors[Role::Query as usize].map_or([0; 4], |query| axes(&query));
    let out = Dims::from([query[0], query[1], dims.query_heads, dims.value_head_dim]);
    let lse = Dims::from([query[0], query[1], dims.query_heads]);
    let accumulator = dtype.accumulator();

    let backward = spec.pass == Pass::Backward;
    if backward {
        // Always read, so that problems that do the same are equal.
        spec.lse = true;
    } else {
        // The builder cannot ask for these, a stored problem can.
        spec.gradients = Gradients::NONE;
    }
    if backward && spec.gradients.is_empty() {
        return Err(InvalidCall::NoGradient);
    }
    let like = |role: Role| spec.tensors[role as usize].map(|desc| (desc.dtype(), desc.shape()));
    let wants = |single: Gradients| spec.gradients.contains(single);
    // Each role with whether the pass has it and what it looks like.
    let expected = [
        (Role::Out, true, Some((dtype, out)), "[B, T, N, Hv]"),
        (Role::Lse, backward || spec.lse, Some((accumulator, lse)), "[B, T, N]"),
        (Role::DOut, backward, Some((dtype, out)), "[B, T, N, Hv]"),
        (Role::DLse, backward && spec.d_lse, Some((accumulator, lse)), "[B, T, N]"),
        (Role::DQuery, wants(Gradients::QUERY), like(Role::Query), "that of the query"),
        (Role::DKey, wants(Gradients::KEY), like(Role::Key), "that of the key"),
        (Role::DValue, wants(Gradients::VALUE), like(Role::Value), "that of the value"),
        (Role::DBias, wants(Gradients::BIAS), like(Role::Bias), "that of the bias"),
        (Role::DSinks, wants(Gradients::SINKS), like(Role::Sinks), "that of the sinks"),
    ];
    for (gradient, role) in [(Gradients::BIAS, Role::Bias), (Gradients::SINKS, Role::Sinks)] {
        if wants(gradient) && like(role).is_none() {
            return Err(InvalidCall::GradientWithoutTensor { gradient, role });
        }
    }
    let written = |role: Role| match role {
        Role::Out | Role::Lse => !backward,
        Role::DOut | Role::DLse => false,
        _ => true,
    };
    for (role, present, shape, why) in expected {
        let why = match role {
            Role::Out | Role::DOut if spec.packs(role) => "[1, total, N, Hv]",
            Role::Lse | Role::DLse if spec.packs(role) => "[1, total, N]",
            _ => why,
        };
        let Some((dtype, shape)) = shape.filter(|_| present) else {
            // The backward variant of a forward problem (`to_builder`) arrives here with layouts it has no
            // use for.
            spec.tensors[role as usize] = None;
            continue;
        };
        let given = spec.tensors[role as usize].unwrap_or_else(|| TensorDesc::contiguous(dtype, shape));
        let with_axes = spec.with_batch_axis(role, given);
        let desc = spec.tensors[role as usize].insert(with_axes);
        if role == Role::DBias && desc.rank() < 4 {
            *desc = broadcast_to_logits(role, desc, dims)?;
        }
        if desc.dtype() != dtype {
            return Err(InvalidCall::DType { role, dtype: desc.dtype(), expected: dtype.name().to_owned() });
        }
        if desc.rank() != shape.rank() {
            let expected = match shape.rank() {
                1 => "1",
                3 => "3",
                _ => "4",
            };
            return Err(InvalidCall::Rank { role, rank: desc.rank(), shape: desc.shape(), expected });
        }
        expect_shape(role, desc, shape, why)?;
        // The strides of a default layout saturate where they overflow.
        fits(role, desc)?;
        if written(role) && desc.may_overlap_itself() {
            return Err(InvalidCall::SelfOverlap { shape: desc.shape(), strides: desc.strides() });
        }
    }
    Ok(())
}
