//! Which part of a rendered conversation the assistant wrote, and which tokens that are.

use super::record::{Conversation, ROLE};
use std::ops::Range;
use tangelo_formats::{ChatTemplate, TokenizerAssets};
use tokenizers::{PostProcessorWrapper, Tokenizer};

/// Tokenises rendered text and finds the tokens of spans.
pub(super) struct Masker {
    /// Without a post-processor: a template writes the special tokens itself, and some post-processors take white space
    /// out of a token's place in the text.
    tokenizer: Tokenizer,
}

impl Masker {
    pub(super) fn new(assets: &TokenizerAssets) -> Masker {
        let mut tokenizer = assets.tokenizer.clone();
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        Masker { tokenizer }
    }

    /// The tokens of `text`, and which of them hold a byte of `spans` (ascending): a token across the border of a span
    /// belongs to it, as for transformers.
    pub(super) fn tokens(&self, text: &str, spans: &[Range<usize>]) -> super::Masked {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| format!("cannot be tokenised: {e}"))?;
        let mut next = 0;
        let trained = encoding.get_offsets().iter().map(|&(start, end)| {
            while spans.get(next).is_some_and(|span| span.end <= start) {
                next += 1;
            }
            // Tokens that stand for no text of their own belong to what follows them.
            spans.get(next).is_some_and(|span| span.start < end.max(start + 1))
        });
        let trained = trained.collect();
        Ok((encoding.get_ids().to_vec(), trained))
    }
}

/// What the assistant writes in `whole`, the rendering of all messages, by a template without `{% generation %}`: for
/// each of its messages, what is behind the rendering of the messages before with the generation prompt, up to the end
/// of the rendering that ends with it.
///
/// # Errors
/// Where a rendering is no beginning of the next: then what belongs to a message is nobody's to say.
pub(super) fn assistant_spans(
    template: &ChatTemplate,
    conversation: &Conversation,
    whole: &str,
) -> Result<Vec<Range<usize>>, String> {
    let messages = &conversation.messages;
    let mut spans: Vec<Range<usize>> = Vec::new();
    for (index, _) in messages.iter().enumerate().filter(|(_, message)| message[ROLE] == "assistant") {
        let differs = |how: &str| {
            format!(
                "message {} (assistant): the chat template has no {{% generation %}} blocks, and renders {how}, so that \
                 what the assistant says cannot be told from the rest. Give data.chat_template a template with \
                 {{% generation %}} around it, or set data.assistant_only_loss = false",
                index + 1
            )
        };
        let end = if index + 1 == messages.len() {
            whole.len()
        } else {
            let until = conversation.render(template, index + 1, false)?.text;
            let is_start = whole.starts_with(&until);
            is_start.then_some(until.len()).ok_or_else(|| differs("it in another way when messages follow"))?
        };
        let start = start_of(template, conversation, index, whole)?
            .filter(|start| *start <= end)
            .ok_or_else(|| differs("the messages before it in another way without it"))?;
        spans.push(start..end);
    }
    spans.retain(|span| span.start < span.end);
    Ok(spans)
}

/// Where message `index` starts; nothing where the messages before it are rendered in another way without it.
fn start_of(
    template: &ChatTemplate,
    conversation: &Conversation,
    index: usize,
    whole: &str,
) -> Result<Option<usize>, String> {
    if index == 0 {
        // Many templates look at the first message and refuse to render none.
        let prompt = conversation.render(template, 0, true).map(|r| r.text).unwrap_or_default();
        return Ok(Some(common_start(&prompt, whole)));
    }
    let prompt = conversation.render(template, index, true)?.text;
    if whole.starts_with(&prompt) {
        return Ok(Some(prompt.len()));
    }
    // A generation prompt may open with more than what the message got, such as an empty thought.
    let before = conversation.render(template, index, false)?.text;
    Ok(whole.starts_with(&before).then(|| common_start(&prompt, whole).max(before.len())))
}

/// Length of the common start, in bytes, whole characters.
fn common_start(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
