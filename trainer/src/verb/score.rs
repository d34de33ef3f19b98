//! `score`: log-probabilities of given tokens, one JSON line in, one out.

use super::generate::print_line;
use crate::error::{Result, TrainError};
use crate::executor::LOSS_CHUNK_TOKENS;
use crate::open_model::{self, Opened};
use serde::{Deserialize, Serialize};
use std::io::BufRead;
use tangelo_configs::requests::ScoreRequest;
use tangelo_kernels::op;
use tangelo_models::{Model, PackContext};
use tch::{Kind, Tensor};

/// One question.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    ids: Option<Vec<u32>>,
    text: Option<String>,
}

/// One answer.
#[derive(Debug, Serialize)]
struct Answer {
    ids: Vec<u32>,
    /// `log p(ids[i] | ids[..i])`; the first has none.
    logprobs: Vec<Option<f64>>,
    /// Mean of -logprobs; none for a single token.
    loss: Option<f64>,
}

/// The verb: reads stdin until its end.
pub fn run(request: &ScoreRequest) -> Result<()> {
    let opened = open_model::open(&request.model)?;
    for (number, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.map_err(|e| TrainError::Data(format!("stdin: {e}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let at_line = |e: TrainError| TrainError::Data(format!("stdin, line {}: {e}", number + 1));
        let answer = answer(&opened, &line).map_err(at_line)?;
        print_line(&serde_json::to_string(&answer).expect("an answer is plain data"))?;
    }
    Ok(())
}

fn answer(opened: &Opened, line: &str) -> Result<Answer> {
    let form = "expected {\"ids\": [...]} or {\"text\": \"...\"}";
    let question: Question = serde_json::from_str(line).map_err(|e| TrainError::Data(format!("{e}; {form}")))?;
    let ids = match (question.ids, question.text) {
        (Some(ids), None) => ids,
        (None, Some(text)) => match &opened.tokenizer {
            Ok(assets) => super::encode(assets, &text)?,
            Err(e) => return Err(TrainError::Data(format!("no tokenizer for text: {e}; give ids"))),
        },
        _ => return Err(TrainError::Data(form.into())),
    };
    super::check_ids(&ids, opened.model.spec().vocab_size)?;
    let scored = logprobs(&opened.model, &ids);
    let loss = (!scored.is_empty()).then(|| -scored.iter().sum::<f64>() / scored.len() as f64);
    let logprobs = ids.first().map(|_| None).into_iter().chain(scored.into_iter().map(Some)).collect();
    Ok(Answer { ids, logprobs, loss })
}

/// `log p(ids[i] | ids[..i])` for i from 1 on.
pub fn logprobs(model: &Model, ids: &[u32]) -> Vec<f64> {
    if ids.len() < 2 {
        return Vec::new();
    }
    let pack = PackContext::single(&ids[..ids.len() - 1], model.device());
    let targets: Vec<i64> = ids[1..].iter().map(|&id| i64::from(id)).collect();
    let targets = Tensor::from_slice(&targets).to_device(model.device());
    let hidden = model.hidden(&pack);
    let values = op::token_logprobs(&hidden, &model.head().weight.value, &targets, 1.0, LOSS_CHUNK_TOKENS);
    Vec::<f64>::try_from(values.to_kind(Kind::Double)).expect("a one-dimensional tensor")
}
