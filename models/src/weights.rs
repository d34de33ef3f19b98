//! The weights of one unit: a flat buffer and views of it.

use std::collections::HashMap;
use tangelo_core::ParamMeta;
use tch::{Device, Kind, Tensor};

/// A weight and where its gradient accumulates.
#[derive(Debug)]
pub struct Weight {
    /// The values: a view of the unit's flat buffer.
    pub value: Tensor,
    /// The fp32 gradient, a view of the unit's flat gradient; `None` where nothing is trained.
    pub main_grad: Option<Tensor>,
}

impl Weight {
    /// Another handle to the same memory.
    pub fn share(&self) -> Weight {
        Weight { value: self.value.shallow_clone(), main_grad: self.main_grad.as_ref().map(Tensor::shallow_clone) }
    }

    /// The gradient buffer by reference.
    pub fn grad(&self) -> Option<&Tensor> {
        self.main_grad.as_ref()
    }
}

/// Where a parameter lies in its unit's flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpan {
    /// Name, full shape.
    pub meta: ParamMeta,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
}

impl ParamSpan {
    /// Elements per index of dim 0.
    pub fn row_len(&self) -> usize {
        self.meta.shape[1..].iter().product()
    }

    /// Lays parameters end to end in the order given.
    pub fn lay_out(metas: Vec<ParamMeta>) -> Vec<ParamSpan> {
        let mut offset = 0;
        let place = |meta: ParamMeta| {
            let len = meta.num_elements();
            let span = ParamSpan { meta, offset, len };
            offset += len;
            span
        };
        metas.into_iter().map(place).collect()
    }
}

/// A unit's parameters in one flat buffer, `[n]`, in execution order.
#[derive(Debug)]
pub struct UnitWeights {
    spans: Vec<ParamSpan>,
    by_name: HashMap<String, usize>,
    flat: Tensor,
    main_grad: Option<Tensor>,
}

impl UnitWeights {
    /// Zeroed weights of type `kind`, with an fp32 gradient buffer where `trained`.
    pub fn zeros(metas: Vec<ParamMeta>, kind: Kind, device: Device, trained: bool) -> UnitWeights {
        let spans = ParamSpan::lay_out(metas);
        let n: usize = spans.iter().map(|s| s.len).sum();
        let by_name = spans.iter().enumerate().map(|(i, s)| (s.meta.name.clone(), i)).collect();
        let flat = Tensor::zeros([n as i64], (kind, device));
        // Gradients are wider than the weights where those are bf16, and as wide as them in float64 checks.
        let grad_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let main_grad = trained.then(|| Tensor::zeros([n as i64], (grad_kind, device)));
        UnitWeights { spans, by_name, flat, main_grad }
    }

    /// The parameters in order.
    pub fn spans(&self) -> &[ParamSpan] {
        &self.spans
    }

    /// The flat buffer `[n]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The flat fp32 gradient `[n]`.
    pub fn main_grad(&self) -> Option<&Tensor> {
        self.main_grad.as_ref()
    }

    /// The span of a parameter, by its full name.
    pub fn span(&self, name: &str) -> Option<&ParamSpan> {
        self.by_name.get(name).map(|&i| &self.spans[i])
    }

    /// One parameter by full name. Panics where the unit has no such parameter: names come from the model's own spec.
    pub fn weight(&self, name: &str) -> Weight {
        self.fused(&[name])
    }

    /// Parameters that lie next to each other and agree in all dims but the first, as one: rows concatenated.
    pub fn fused(&self, names: &[&str]) -> Weight {
        let spans: Vec<&ParamSpan> =
            names.iter().map(|n| self.span(n).unwrap_or_else(|| panic!("the unit has no parameter {n}"))).collect();
        for pair in spans.windows(2) {
            assert_eq!(pair[0].offset + pair[0].len, pair[1].offset, "{names:?} are not adjacent");
            assert_eq!(pair[0].meta.shape[1..], pair[1].meta.shape[1..], "{names:?} differ beyond dim 0");
        }
        let rows: usize = spans.iter().map(|s| s.meta.shape[0]).sum();
        let mut shape: Vec<i64> = spans[0].meta.shape.iter().map(|&n| n as i64).collect();
        shape[0] = rows as i64;
        let (offset, len) = (spans[0].offset as i64, shape.iter().product::<i64>());
        let view = |flat: &Tensor| flat.narrow(0, offset, len).view(shape.as_slice());
        Weight { value: view(&self.flat), main_grad: self.main_grad.as_ref().map(view) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_core::DType;

    fn meta(name: &str, shape: &[usize]) -> ParamMeta {
        ParamMeta { name: name.into(), shape: shape.into(), dtype: DType::F32 }
    }

    #[test]
    fn fused_weights_share_the_flat_buffer() {
        let metas = vec![meta("n", &[3]), meta("q", &[2, 3]), meta("k", &[1, 3])];
        let unit = UnitWeights::zeros(metas, Kind::BFloat16, Device::Cpu, true);
        let mut qk = unit.fused(&["q", "k"]);
        assert_eq!(qk.value.size(), [3, 3]);
        let _ = qk.value.fill_(1.0);
        assert_eq!(unit.flat().sum(Kind::Float).double_value(&[]), 9.0);
        assert_eq!(unit.weight("n").value.sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(qk.main_grad.unwrap().kind(), Kind::Float);
    }

    #[test]
    #[should_panic(expected = "not adjacent")]
    fn fusing_strangers_is_our_bug() {
        let metas = vec![meta("q", &[2, 3]), meta("n", &[3]), meta("k", &[1, 3])];
        let _ = UnitWeights::zeros(metas, Kind::Float, Device::Cpu, false).fused(&["q", "k"]);
    }
}
