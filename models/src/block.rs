//! One block: norm, mixer, norm, feed-forward, each half added to the residual stream.

use crate::context::{PackContext, RopeTable};
use crate::decode::LayerCache;
use crate::weights::{UnitWeights, Weight};
use tangelo_configs::{AttentionSpec, BlockSpec, MixerSpec};
use tangelo_kernels::op;
use tch::Tensor;

/// The weights of one block, as views of its unit's flat buffer.
#[derive(Debug)]
pub struct BlockWeights {
    input_norm: Weight,
    /// `[(H + 2K) * head_dim, D]`: q, k and v as one product.
    qkv: Projection,
    q_norm: Option<Weight>,
    k_norm: Option<Weight>,
    output: Projection,
    post_norm: Weight,
    /// `[2F, D]`: gate and up as one product.
    gate_up: Projection,
    down: Projection,
}

/// A linear layer's weight `[out, in]` and bias `[out]`.
#[derive(Debug)]
struct Projection {
    weight: Weight,
    bias: Option<Weight>,
}

impl Projection {
    fn new(unit: &UnitWeights, prefix: &str, parts: &[&str], bias: bool) -> Projection {
        let fused = |suffix: &str| {
            let names: Vec<String> = parts.iter().map(|p| format!("{prefix}{p}.{suffix}")).collect();
            unit.fused(&names.iter().map(String::as_str).collect::<Vec<_>>())
        };
        Projection { weight: fused("weight"), bias: bias.then(|| fused("bias")) }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        op::linear(
            x,
            &self.weight.value,
            self.bias.as_ref().map(|b| &b.value),
            self.weight.grad(),
            self.bias.as_ref().and_then(Weight::grad),
        )
    }
}

impl BlockWeights {
    /// The views of block `layer`.
    pub fn new(spec: &BlockSpec, layer: usize, unit: &UnitWeights) -> BlockWeights {
        let MixerSpec::Attention(a) = &spec.mixer;
        let p = format!("model.layers.{layer}.");
        let weight = |name: &str| unit.weight(&format!("{p}{name}.weight"));
        let (attention, mlp) = (format!("{p}self_attn."), format!("{p}mlp."));
        let bias = spec.feed_forward.bias;
        BlockWeights {
            input_norm: weight("input_layernorm"),
            qkv: Projection::new(unit, &attention, &["q_proj", "k_proj", "v_proj"], a.qkv_bias),
            q_norm: a.qk_norm.then(|| weight("self_attn.q_norm")),
            k_norm: a.qk_norm.then(|| weight("self_attn.k_norm")),
            output: Projection::new(unit, &attention, &["o_proj"], a.output_bias),
            post_norm: weight("post_attention_layernorm"),
            gate_up: Projection::new(unit, &mlp, &["gate_proj", "up_proj"], bias),
            down: Projection::new(unit, &mlp, &["down_proj"], bias),
        }
    }
}

/// The shape of one block; no weights.
#[derive(Clone, Debug)]
pub struct Block {
    spec: BlockSpec,
    rms_norm_eps: f64,
    rope: RopeTable,
}

/// Rotary angles of a micro-batch, taken once and read by every block: each `[T, head_dim / 2]`, f32.
#[derive(Debug)]
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Block {
    /// A block of `spec`.
    pub fn new(spec: BlockSpec, rms_norm_eps: f64) -> Block {
        let MixerSpec::Attention(a) = &spec.mixer;
        let rope = RopeTable::new(&a.rope, a.head_dim);
        Block { spec, rms_norm_eps, rope }
    }

    /// What the block is.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// The rotary angles of `positions` (`[T]`, i64).
    pub fn angles(&self, positions: &Tensor) -> Angles {
        let (cos, sin) = self.rope.angles(positions);
        Angles { cos, sin }
    }

    /// Whether two blocks turn positions into the same angles.
    pub fn same_angles(&self, other: &Block) -> bool {
        self.rope == other.rope
    }

    /// `x` `[T, D]` to `[T, D]`. With a `cache`, the tokens continue the one document it holds.
    pub fn forward(
        &self,
        w: &BlockWeights,
        x: &Tensor,
        pack: &PackContext,
        angles: &Angles,
        cache: Option<&mut LayerCache>,
    ) -> Tensor {
        let mixed = self.mix(w, &self.norm(x, &w.input_norm), pack, angles, cache);
        let post_norm = &w.post_norm;
        let (normed, x) = op::add_rms_norm(x, &mixed, &post_norm.value, self.rms_norm_eps, post_norm.grad());
        let hidden = op::swiglu(&w.gate_up.forward(&normed));
        x + w.down.forward(&hidden)
    }

    fn norm(&self, x: &Tensor, weight: &Weight) -> Tensor {
        op::rms_norm(x, &weight.value, self.rms_norm_eps, weight.grad())
    }

    fn mix(
        &self,
        w: &BlockWeights,
        x: &Tensor,
        pack: &PackContext,
        angles: &Angles,
        cache: Option<&mut LayerCache>,
    ) -> Tensor {
        let MixerSpec::Attention(a) = &self.spec.mixer;
        let (q, k, v) = self.heads(w, a, &w.qkv.forward(x), angles);
        let (scale, window) = ((a.head_dim as f64).powf(-0.5), a.sliding_window.map(|n| n as i64));
        let attended = match cache {
            None => op::attention(&q, &k, &v, &pack.cu_seqlens, scale, window),
            Some(cache) => {
                let (k, v) = cache.append(&k, &v);
                op::attention_with_past(&q, &k, &v, scale, window)
            }
        };
        w.output.forward(&attended.reshape([-1, (a.num_heads * a.head_dim) as i64]))
    }

    /// q `[T, H, head_dim]`, k and v `[T, K, head_dim]`, positions applied to q and k.
    fn heads(&self, w: &BlockWeights, a: &AttentionSpec, qkv: &Tensor, angles: &Angles) -> (Tensor, Tensor, Tensor) {
        let (h, k, d) = (a.num_heads as i64, a.num_kv_heads as i64, a.head_dim as i64);
        let (Some(q_norm), Some(k_norm)) = (&w.q_norm, &w.k_norm) else {
            return op::qkv_rope(qkv, &angles.cos, &angles.sin, h, k, d);
        };
        let heads = |start: i64, n: i64| qkv.narrow(1, start * d, n * d).reshape([-1, n, d]);
        let (q, key, v) = (self.norm(&heads(0, h), q_norm), self.norm(&heads(h, k), k_norm), heads(h + k, k));
        let (q, key) = op::rope(&q, &key, &angles.cos, &angles.sin);
        (q, key, v)
    }
}
