//! Reductions of whole parts, in ascending rank order.

use tch::{Kind, Tensor};

/// How values of the ranks are combined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum, in rank order, in fp32 for 16-bit types, rounded once.
    #[default]
    Sum,
    /// The largest value; NaN where any rank holds NaN.
    Max,
    /// The smallest value; NaN where any rank holds NaN.
    Min,
}

/// The type in which values of type `kind` are combined.
pub(crate) fn accumulation_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    }
}

/// `output = ((parts[0] + parts[1]) + parts[2]) + ...`. The output may overlap any part.
pub(crate) fn reduce_in_rank_order(parts: &[Tensor], output: &Tensor, op: ReduceOp) -> Result<(), tch::TchError> {
    let kind = accumulation_kind(output.kind());
    let mut sum = parts[0].f_totype(kind)?;
    if let [_, second, rest @ ..] = parts {
        sum = combine(&sum, second, kind, op)?;
        for part in rest {
            match op {
                ReduceOp::Sum => _ = sum.f_add_(&part.f_totype(kind)?)?,
                _ => sum = combine(&sum, part, kind, op)?,
            }
        }
    }
    output.shallow_clone().f_copy_(&sum)
}

fn combine(left: &Tensor, right: &Tensor, kind: Kind, op: ReduceOp) -> Result<Tensor, tch::TchError> {
    let right = right.f_totype(kind)?;
    match op {
        ReduceOp::Sum => left.f_add(&right),
        ReduceOp::Max => left.f_maximum(&right),
        ReduceOp::Min => left.f_minimum(&right),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bit_sums_are_rounded_once() {
        // 256 + 1 = 256 in bf16: rounding at every step would lose all the ones.
        let parts: Vec<Tensor> = [256.0, 1.0, 1.0, 1.0, 1.0]
            .iter()
            .map(|&v| Tensor::full([3], v, (Kind::BFloat16, tch::Device::Cpu)))
            .collect();
        let output = Tensor::zeros([3], (Kind::BFloat16, tch::Device::Cpu));
        reduce_in_rank_order(&parts, &output, ReduceOp::Sum).unwrap();
        assert_eq!(Vec::<f32>::try_from(output.to_kind(Kind::Float)).unwrap(), [260.0; 3]);
    }

    #[test]
    fn the_order_is_that_of_the_ranks() {
        let part = |v: f32| Tensor::from_slice(&[v]);
        let output = part(0.0);
        let check = |values: &[f32], op, want: f32| {
            let parts: Vec<Tensor> = values.iter().map(|&v| part(v)).collect();
            reduce_in_rank_order(&parts, &output, op).unwrap();
            assert_eq!(output.double_value(&[0]) as f32, want);
        };
        check(&[1e8, -1e8, 1.0], ReduceOp::Sum, 1.0);
        check(&[1.0, 1e8, -1e8], ReduceOp::Sum, 0.0);
        check(&[1.0, 5.0, -3.0], ReduceOp::Max, 5.0);
        check(&[1.0, 5.0, -3.0], ReduceOp::Min, -3.0);
    }
}
