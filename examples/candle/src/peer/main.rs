//! candle's own attention for sequences of different lengths on the CPU, for `cargo xtask bench --peer candle`:
//! `benches/peers/peer.py` says how it is talked to. Forward, f32 and f16, what `candle_nn::attention` has for
//! packed tensors.

use std::error::Error;
use std::io::{BufRead, Write};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::attention::{flash_attn_varlen_cpu, flash_attn_varlen_unfused};
use serde_json::{Value, json};

/// The version of candle-nn in the workspace's manifest.
const VERSION: &str = "0.11";

type Failure = Box<dyn Error>;

/// A call that is ready to be made.
struct Call {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    longest: [usize; 2],
    scale: f32,
    causal: bool,
    fused: bool,
}

impl Call {
    fn prepare(request: &Value) -> Result<Self, Failure> {
        let size = |name: &str| -> Result<usize, Failure> {
            let size = request[name].as_u64().ok_or_else(|| format!("{name} is no size"))?;
            Ok(size.try_into()?)
        };
        if request["pass"] != "forward" {
            return Err("candle's attention for packed tensors has no backward pass on the CPU".into());
        }
        if request["mask"] != "none" {
            return Err("candle's attention for packed tensors takes no mask and no bias".into());
        }
        let dtype = match request["dtype"].as_str() {
            Some("f32") => DType::F32,
            Some("f16") => DType::F16,
            other => return Err(format!("candle has no such attention in {}", other.unwrap_or("?")).into()),
        };
        let [heads, key_heads, width] = [size("n")?, size("k")?, size("h")?];
        if size("hv")? != width {
            return Err("candle's attention has heads of one width".into());
        }
        // Without lengths of their own, sequences are as long as the rectangle.
        let lengths: Vec<[u32; 2]> = match &request["lengths"] {
            Value::Null => vec![[size("t")?.try_into()?, size("s")?.try_into()?]; size("b")?],
            lengths => serde_json::from_value(lengths.clone())?,
        };
        let [queries, keys] = [0, 1].map(|side| -> Vec<u32> { lengths.iter().map(|of| of[side]).collect() });
        let total = |of: &[u32]| of.iter().map(|&length| length as usize).sum::<usize>();
        let longest = [&queries, &keys].map(|of| of.iter().max().map_or(0, |&length| length as usize));
        let device = Device::Cpu;
        let normal = |rows: usize, heads: usize| {
            Tensor::randn(0f32, 1.0, (rows, heads, width), &device)?.to_dtype(dtype)
        };
        Ok(Self {
            query: normal(total(&queries), heads)?,
            key: normal(total(&keys), key_heads)?,
            value: normal(total(&keys), key_heads)?,
            queries: Tensor::new(queries, &device)?,
            keys: Tensor::new(keys, &device)?,
            longest,
            scale: 1.0 / (width as f32).sqrt(),
            causal: request["causal"] == true,
            fused: request["path"] != "math",
        })
    }

    fn path(&self) -> &'static str {
        if self.fused { "flash_attn_varlen_cpu" } else { "flash_attn_varlen_unfused" }
    }

    /// Makes the call; its milliseconds.
    fn time(&self) -> Result<f64, Failure> {
        let run = if self.fused { flash_attn_varlen_cpu } else { flash_attn_varlen_unfused };
        let Self { query, key, value, queries, keys, longest: [rows, columns], scale, causal, .. } = self;
        let start = Instant::now();
        run(query, key, value, None, queries, keys, *rows, *columns, *scale, *causal, None, None)?;
        Ok(1e3 * start.elapsed().as_secs_f64())
    }
}

/// What a request is answered with.
fn answer(request: &Value, call: &mut Option<Call>) -> Result<Value, Failure> {
    match request["op"].as_str() {
        Some("prepare") => {
            // The tensors of the call before go first: both sets may not fit.
            *call = None;
            let prepared = Call::prepare(request)?;
            prepared.time()?;
            let path = prepared.path();
            *call = Some(prepared);
            Ok(json!({"ok": true, "path": path}))
        }
        Some("time") => {
            let call = call.as_ref().ok_or("nothing is prepared")?;
            let repeats = request["repeats"].as_u64().ok_or("repeats is no number")?;
            let times = (0..repeats).map(|_| call.time()).collect::<Result<Vec<_>, _>>()?;
            Ok(json!({"ok": true, "ms": times}))
        }
        other => Err(format!("unknown op {other:?}").into()),
    }
}

fn main() -> Result<(), Failure> {
    // candle spreads this attention over rayon's threads, of which RAYON_NUM_THREADS says how many there are.
    let threads = candle_core::utils::get_num_threads();
    let mut out = std::io::stdout().lock();
    let mut say = |answer: &Value| writeln!(out, "{answer}").and_then(|()| out.flush());
    say(&json!({"ready": true, "peer": "candle", "version": VERSION, "device": "cpu", "threads": threads}))?;
    let mut call = None;
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        if request["op"] == "quit" {
            return Ok(());
        }
        let answer = answer(&request, &mut call)
            .unwrap_or_else(|error| json!({"ok": false, "reason": error.to_string()}));
        say(&answer)?;
    }
    Ok(())
}
