//! What the field's systems would receive for the same transition.

/// Bytes that one rank receives, as fractions of the model's M bytes turned into bytes: table 2 of HybridFlow
/// (arXiv 2409.19256), for training with p stages, t tensor ranks and d replicas.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PaperBytes {
    /// (t p d - 1) / (t p d) M: everything is gathered over all ranks (ZeRO-3 training).
    pub deepspeed_chat: f64,
    /// (t p - 1) / (t p) M: gathered over a replica's ranks.
    pub hybridflow_v: f64,
    /// (t p - t_g p_g) / (t_g p_g t p) M: gathered over a micro data-parallel group.
    pub hybridflow: f64,
}

/// For generation with `t_g` tensor ranks and one stage.
pub fn paper_bytes(model_bytes: f64, [p, t, d]: [usize; 3], t_g: usize) -> PaperBytes {
    let [p, t, d, t_g] = [p, t, d, t_g].map(|n| n as f64);
    PaperBytes {
        deepspeed_chat: (t * p * d - 1.0) / (t * p * d) * model_bytes,
        hybridflow_v: (t * p - 1.0) / (t * p) * model_bytes,
        hybridflow: (t * p - t_g) / (t_g * t * p) * model_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_example() {
        // 1-4-2 to 1-2: a quarter of the model arrives where a rank trains a quarter and generates with a half.
        let bytes = paper_bytes(8.0, [1, 4, 2], 2);
        assert_eq!((bytes.deepspeed_chat, bytes.hybridflow_v, bytes.hybridflow), (7.0, 6.0, 2.0));
    }
}
