//! One block: norm, mixer, norm, feed-forward, each half added to the residual stream.

use crate::context::{PackContext, RopeTable};
use crate::decode::LayerPast;
use crate::weights::{UnitWeights, Weight};
use tangelo_configs::{BlockSpec, MixerSpec};
use tangelo_core::{Part, Parts};
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
///
/// Where tensor parallelism cuts the inputs, ranks sum what they make: then only the first adds the bias.
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
    /// The views of block `layer`. `adds_bias` tells whether this rank adds the biases of sums over tensor ranks.
    pub fn new(spec: &BlockSpec, layer: usize, unit: &UnitWeights, adds_bias: bool) -> BlockWeights {
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
            output: Projection::new(unit, &attention, &["o_proj"], a.output_bias && adds_bias),
            post_norm: weight("post_attention_layernorm"),
            gate_up: Projection::new(unit, &mlp, &["gate_proj", "up_proj"], bias),
            down: Projection::new(unit, &mlp, &["down_proj"], bias && adds_bias),
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

/// What flows through a block.
#[derive(Debug)]
pub struct Flow {
    /// The residual stream, `[T, D]`.
    pub x: Tensor,
    /// What is being worked on: `[h]`, `[q, k, v]`, `[o]` or nothing.
    pub work: Vec<Tensor>,
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

    /// Some parts of the block. Norms and residuals take this rank's tokens, products and attention those that it was
    /// given in between; see [`Part`] for what each part reads and leaves. With a `past`, the tokens continue the sequences
    /// that it holds.
    pub fn run(
        &self,
        parts: Parts,
        w: &BlockWeights,
        flow: Flow,
        pack: &PackContext,
        angles: &Angles,
        mut past: Option<LayerPast<'_>>,
    ) -> Flow {
        let Flow { mut x, mut work } = flow;
        for part in Part::ALL.into_iter().filter(|&part| parts.contains(part)) {
            match part {
                Part::InputNorm => work = vec![self.norm(&x, &w.input_norm)],
                Part::Qkv => work = self.heads(w, &w.qkv.forward(&work[0]), angles),
                Part::Attend => work = vec![self.attend(&work, pack, past.as_mut())],
                Part::Output => work = vec![w.output.forward(&work[0].flatten(1, 2))],
                // Both at once where nothing lies between them.
                Part::AttentionResidual if parts.contains(Part::PostNorm) => {
                    let norm = &w.post_norm;
                    let (normed, sum) = op::add_rms_norm(&x, &work[0], &norm.value, self.rms_norm_eps, norm.grad());
                    (x, work) = (sum, vec![normed]);
                }
                Part::PostNorm if parts.contains(Part::AttentionResidual) => {}
                Part::PostNorm => work = vec![self.norm(&x, &w.post_norm)],
                Part::FeedForward => work = vec![w.down.forward(&op::swiglu(&w.gate_up.forward(&work[0])))],
                Part::AttentionResidual | Part::FeedForwardResidual => {
                    x = &x + &work[0];
                    work.clear();
                }
            }
        }
        Flow { x, work }
    }

    fn norm(&self, x: &Tensor, weight: &Weight) -> Tensor {
        op::rms_norm(x, &weight.value, self.rms_norm_eps, weight.grad())
    }

    /// How attention weighs: the scale of scores, and the window in tokens.
    pub fn attention_scale(&self) -> (f64, Option<i64>) {
        let MixerSpec::Attention(a) = &self.spec.mixer;
        ((a.head_dim as f64).powf(-0.5), a.sliding_window.map(|n| n as i64))
    }

    fn attend(&self, qkv: &[Tensor], pack: &PackContext, past: Option<&mut LayerPast<'_>>) -> Tensor {
        let [q, k, v] = qkv else { unreachable!("attention reads queries, keys and values") };
        let (scale, window) = self.attention_scale();
        match past {
            None => op::attention_with_prefixes(q, k, v, &pack.cu_seqlens, &pack.prefixes, scale, window),
            Some(past) => past.attend([q, k, v], scale, window),
        }
    }

    /// q `[T, H, head_dim]`, k and v `[T, K, head_dim]`, positions applied to q and k.
    fn heads(&self, w: &BlockWeights, qkv: &Tensor, angles: &Angles) -> Vec<Tensor> {
        let MixerSpec::Attention(a) = &self.spec.mixer;
        let (h, k, d) = (a.num_heads as i64, a.num_kv_heads as i64, a.head_dim as i64);
        let (Some(q_norm), Some(k_norm)) = (&w.q_norm, &w.k_norm) else {
            let (q, k, v) = op::qkv_rope(qkv, &angles.cos, &angles.sin, h, k, d);
            return vec![q, k, v];
        };
        let heads = |start: i64, n: i64| qkv.narrow(1, start * d, n * d).reshape([-1, n, d]);
        let (q, key, v) = (self.norm(&heads(0, h), q_norm), self.norm(&heads(h, k), k_norm), heads(h + k, k));
        let (q, key) = op::rope(&q, &key, &angles.cos, &angles.sin);
        vec![q, key, v]
    }
}
