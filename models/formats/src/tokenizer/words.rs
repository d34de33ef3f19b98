//! Regular expressions that cut text into words before byte-level BPE. The data room knows them too and cuts without
//! running them, so each is spelled here alone.

/// The family that OpenAI's cl100k made common, for runs of digits that match `digits`: contractions, letters, digits,
/// punctuation, spaces. With `\p{N}{1,3}` it is Llama 3's, with `\p{N}` Qwen2's (as their tokenizer.json say).
pub fn cl100k(digits: &str) -> String {
    let (contraction, word) = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+");
    format!(r"{contraction}|{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
}
