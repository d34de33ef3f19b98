//! Text from tokens as they come.

use crate::error::BoxError;
use std::ops::Deref;
use tokenizers::Tokenizer;

/// Tokens that may wait for the end of a character. Four bytes make any, so more means bytes that never will.
const MAX_PENDING: usize = 8;

/// Turns ids into text one at a time. A character whose bytes are spread over several tokens comes out when its last
/// byte is there; what comes out, put together, is the text of all ids. Bytes that form no character come out as
/// U+FFFD. Work per token does not grow with the text. `T` is a tokenizer, borrowed or shared.
#[derive(Clone)]
pub struct StreamDecoder<T> {
    tokenizer: T,
    skip_special_tokens: bool,
    /// The tokens of the last piece that came out, which decide how the next ones join it, then those that wait.
    ids: Vec<u32>,
    /// How many of `ids` have come out.
    done: usize,
}

impl<T: Deref<Target = Tokenizer>> StreamDecoder<T> {
    /// A decoder at the start of a text; `skip_special_tokens` leaves out the text of special tokens.
    pub fn new(tokenizer: T, skip_special_tokens: bool) -> StreamDecoder<T> {
        StreamDecoder { tokenizer, skip_special_tokens, ids: Vec::new(), done: 0 }
    }

    /// Takes the next id and returns the text that it completes, if any.
    ///
    /// # Errors
    /// Where the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, BoxError> {
        if self.has_no_text(id) {
            return Ok(None);
        }
        self.ids.push(id);
        let text = self.pending()?;
        if text.is_empty() || (text.ends_with('\u{FFFD}') && self.ids.len() - self.done < MAX_PENDING) {
            return Ok(None);
        }
        self.ids.drain(..self.done);
        self.done = self.ids.len();
        Ok(Some(text))
    }

    /// Returns what still waits; the next id starts a new text.
    ///
    /// # Errors
    /// Where the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<Option<String>, BoxError> {
        let text = self.pending()?;
        self.ids.clear();
        self.done = 0;
        Ok((!text.is_empty()).then_some(text))
    }

    fn has_no_text(&self, id: u32) -> bool {
        let added = self.tokenizer.get_added_vocabulary();
        self.tokenizer.id_to_token(id).is_none_or(|token| self.skip_special_tokens && added.is_special_token(&token))
    }

    /// The text of the waiting tokens: what they add to the text of those before them.
    fn pending(&self) -> Result<String, BoxError> {
        let before = self.tokenizer.decode(&self.ids[..self.done], self.skip_special_tokens)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(all.strip_prefix(&before).map(str::to_owned).unwrap_or(all))
    }
}
