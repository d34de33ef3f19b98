//! The threads of preparation.
//!
//! ```text
//!            chunks (text + reply)           tokens, by reply
//! reader ------------------------> workers -------------------> writer (the caller's thread) -> shards
//!    \________________ replies, in the order of the text ________________/
//! ```
//!
//! | thread | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|---|
//! | reader | source files | room in the budget | the writer releasing a chunk | `buffer_bytes` of text |
//! | workers | chunks | a chunk | the reader | `num_threads` |
//! | writer | replies in order | the oldest chunk's tokens | its worker | the reader's budget |
//!
//! The writer takes the reply of the oldest chunk first, so that the output is in the order of the text whatever
//! thread was faster. Whoever fails or ends drops its channel ends, and the others end at their next send or receive.

use super::{Encoder, PrepareOptions};
use crate::encode::{Scratch, TextTokenizer};
use crate::error::{DataError, Result};
use crate::manifest::Origin;
use crate::progress::{PrepareProgress, Progress};
use crate::shard::{ChatCounts, Cursor, ShardRecord, ShardWriter};
use crate::source::{OpenFile, ScannedFile};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Text handed to a worker at once; a longer document is a chunk of its own.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks between reader and writer, whatever their size.
const MAX_CHUNKS: usize = 1024;

/// Documents on their way to a worker.
struct Chunk {
    documents: Vec<Document>,
    text_bytes: usize,
    /// Empty documents passed over since the chunk before.
    empty: u64,
    /// Bytes of source files read up to here.
    bytes_done: u64,
}

struct Document {
    text: String,
    at: Cursor,
    /// The line or row it stands in.
    place: u64,
}

/// The tokens of a chunk.
struct Tokenised {
    tokens: Vec<u32>,
    /// Of conversations: whether each token is trained.
    trained: Vec<bool>,
    /// End of each document in `tokens`, and what became of it.
    ends: Vec<(usize, Fate)>,
    chunk: Chunk,
}

/// What became of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Whole,
    Truncated,
    /// It is left out.
    Dropped,
}

type Reply = Receiver<Result<Tokenised>>;
/// A chunk and where its tokens go.
type Task = (Chunk, Sender<Result<Tokenised>>);

/// Text that is under way, in bytes.
struct Budget {
    used: Mutex<(usize, bool)>,
    freed: Condvar,
    limit: usize,
}

impl Budget {
    fn lock(&self) -> MutexGuard<'_, (usize, bool)> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room; a chunk larger than the limit passes alone. False once closed.
    fn acquire(&self, bytes: usize) -> bool {
        let mut state = self.lock();
        while !state.1 && state.0 > 0 && state.0 + bytes > self.limit {
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.0 += bytes;
        !state.1
    }

    fn release(&self, bytes: usize) {
        self.lock().0 -= bytes;
        self.freed.notify_all();
    }

    fn close(&self) {
        self.lock().1 = true;
        self.freed.notify_all();
    }
}

/// Tokenises what is behind `shards` and returns all shards.
pub(super) fn tokenise(
    options: &PrepareOptions,
    tokenizer: &TextTokenizer,
    encoder: &Encoder,
    origin: &Origin,
    shards: Vec<ShardRecord>,
    progress: &dyn Progress,
) -> Result<Vec<ShardRecord>> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let num_threads = if options.num_threads == 0 { cores } else { options.num_threads };
    let start = shards.last().map(|s| s.end).unwrap_or_default();
    let budget = Budget { used: Mutex::new((0, false)), freed: Condvar::new(), limit: options.buffer_bytes };
    let (chunk_sender, chunk_receiver) = sync_channel::<Task>(MAX_CHUNKS);
    let (reply_sender, replies) = sync_channel::<Result<Reply>>(MAX_CHUNKS);
    let chunk_receiver = Mutex::new(chunk_receiver);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reader = Reader { options, origin, budget: &budget, chunks: chunk_sender, replies: reply_sender };
            if let Err(error) = reader.run(start) {
                // The writer may be gone already: then it has an error of its own.
                let _ = reader.replies.send(Err(error));
            }
        });
        let workers: Vec<_> =
            (0..num_threads).map(|_| scope.spawn(|| work(encoder, origin, &chunk_receiver))).collect();
        let written = Writer::new(options, origin, tokenizer, shards, progress).run(replies, &budget);
        budget.close();
        let ended = reader.join().is_ok() & workers.into_iter().fold(true, |ok, worker| worker.join().is_ok() & ok);
        match written {
            Ok(_) if !ended => Err(DataError::Internal("a tokenising thread ended early".into())),
            other => other,
        }
    })
}

/// A worker: tokenises chunks until there are none.
fn work(encoder: &Encoder, origin: &Origin, chunks: &Mutex<Receiver<Task>>) {
    let mut scratch = Scratch::default();
    loop {
        let next = chunks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((chunk, reply)) = next else { return };
        // The writer may have failed meanwhile and be gone.
        let _ = reply.send(tokenise_chunk(encoder, origin, chunk, &mut scratch));
    }
}

fn tokenise_chunk(encoder: &Encoder, origin: &Origin, chunk: Chunk, scratch: &mut Scratch) -> Result<Tokenised> {
    let mut tokens = Vec::with_capacity(chunk.text_bytes / 3);
    let (mut trained, mut ends) = (Vec::new(), Vec::with_capacity(chunk.documents.len()));
    for document in &chunk.documents {
        let fate = match encoder {
            Encoder::Text(tokenizer) => {
                tokenizer.encode(&document.text, scratch, &mut tokens)?;
                Fate::Whole
            }
            Encoder::Chat(chat) => {
                let file = &origin.files[document.at.file].file;
                let encoded = chat.encode(&document.text, scratch);
                let encoded = encoded.map_err(|reason| DataError::row(file, document.place, reason))?;
                let truncated = encoded.as_ref().map(|e| e.truncated);
                let encoded = encoded.unwrap_or_default();
                tokens.extend(encoded.tokens);
                trained.extend(encoded.trained);
                truncated.map_or(Fate::Dropped, |cut| if cut { Fate::Truncated } else { Fate::Whole })
            }
        };
        ends.push((tokens.len(), fate));
    }
    Ok(Tokenised { tokens, trained, ends, chunk })
}

struct Reader<'a> {
    options: &'a PrepareOptions,
    origin: &'a Origin,
    budget: &'a Budget,
    chunks: SyncSender<Task>,
    replies: SyncSender<Result<Reply>>,
}

impl Reader<'_> {
    /// Reads all files from `start` on.
    fn run(&mut self, start: Cursor) -> Result<()> {
        let mut chunk = Chunk { documents: Vec::new(), text_bytes: 0, empty: 0, bytes_done: 0 };
        for (index, file) in self.origin.read_files() {
            if index < start.file {
                chunk.bytes_done += file.size_bytes;
                continue;
            }
            let skip = if index == start.file { start.document } else { 0 };
            if !self.read_file(index, file, skip, &mut chunk)? {
                return Ok(());
            }
        }
        self.send(chunk);
        Ok(())
    }

    /// Reads one file, passing over its first `skip` documents. False when nobody listens any more.
    fn read_file(&mut self, index: usize, file: &ScannedFile, skip: u64, chunk: &mut Chunk) -> Result<bool> {
        let base = chunk.bytes_done;
        let mut open = OpenFile::open(&file.file, self.options.content(), self.options.max_document_bytes)?;
        let mut document = 0;
        while let Some(text) = open.next_document()? {
            let at = Cursor { file: index, document };
            document += 1;
            if document <= skip {
                continue;
            }
            if text.is_empty() {
                chunk.empty += 1;
                continue;
            }
            chunk.text_bytes += text.len();
            chunk.documents.push(Document { text, at, place: open.place() });
            chunk.bytes_done = base + open.bytes_read();
            if chunk.text_bytes >= CHUNK_BYTES {
                let bytes_done = chunk.bytes_done;
                let full = std::mem::replace(chunk, Chunk { documents: vec![], text_bytes: 0, empty: 0, bytes_done });
                if !self.send(full) {
                    return Ok(false);
                }
            }
        }
        chunk.bytes_done = base + file.size_bytes;
        Ok(true)
    }

    /// Hands a chunk over; false when the writer or the workers are gone.
    fn send(&mut self, chunk: Chunk) -> bool {
        let (sender, reply) = channel();
        self.budget.acquire(chunk.text_bytes)
            && self.chunks.send((chunk, sender)).is_ok()
            && self.replies.send(Ok(reply)).is_ok()
    }
}

struct Writer<'a> {
    options: &'a PrepareOptions,
    tokenizer: &'a TextTokenizer,
    shards: Vec<ShardRecord>,
    current: Option<ShardWriter>,
    progress: &'a dyn Progress,
    state: PrepareProgress,
    /// Empty documents not yet counted in a shard, and what became of conversations.
    empty: u64,
    chat: ChatCounts,
}

impl<'a> Writer<'a> {
    fn new(
        options: &'a PrepareOptions,
        origin: &Origin,
        tokenizer: &'a TextTokenizer,
        shards: Vec<ShardRecord>,
        progress: &'a dyn Progress,
    ) -> Writer<'a> {
        let state = PrepareProgress {
            bytes_done: 0,
            bytes_total: origin.read_files().map(|(_, f)| f.size_bytes).sum(),
            documents: shards.iter().map(|s| s.documents).sum(),
            tokens: shards.iter().map(|s| s.tokens).sum(),
        };
        progress.phase("tokenising");
        Writer { options, tokenizer, shards, current: None, progress, state, empty: 0, chat: ChatCounts::default() }
    }

    /// Writes everything; a shard that is not finished in the end is removed.
    fn run(mut self, replies: Receiver<Result<Reply>>, budget: &Budget) -> Result<Vec<ShardRecord>> {
        let result = self.write_all(replies, budget);
        if let Some(unfinished) = self.current.take() {
            unfinished.discard();
        }
        result.map(|()| self.shards)
    }

    fn write_all(&mut self, replies: Receiver<Result<Reply>>, budget: &Budget) -> Result<()> {
        for reply in replies {
            let lost = |_| DataError::Internal("a tokenising thread ended without an answer".into());
            let tokenised = reply?.recv().map_err(lost)??;
            self.write(&tokenised).map_err(|error| self.explain(error))?;
            budget.release(tokenised.chunk.text_bytes);
            self.progress.update(&self.state);
            if self.progress.cancelled() {
                return Err(DataError::Interrupted);
            }
        }
        self.finish_shard().map_err(|error| self.explain(error))?;
        if let Some(last) = self.shards.last_mut() {
            last.empty_documents += self.empty;
            last.chat = last.chat.map(|counts| counts.plus(self.chat));
        }
        Ok(())
    }

    fn write(&mut self, tokenised: &Tokenised) -> Result<()> {
        self.empty += tokenised.chunk.empty;
        let mut start = 0;
        for (document, &(end, fate)) in tokenised.chunk.documents.iter().zip(&tokenised.ends) {
            let trained = tokenised.trained.get(start..end).unwrap_or_default();
            self.chat.truncated += u64::from(fate == Fate::Truncated);
            self.chat.dropped += u64::from(fate == Fate::Dropped);
            self.chat.trained_tokens += trained.iter().skip(1).filter(|trained| **trained).count() as u64;
            if fate != Fate::Dropped {
                self.push(&tokenised.tokens[start..end], trained, document)?;
            }
            start = end;
        }
        self.state.bytes_done = tokenised.chunk.bytes_done;
        Ok(())
    }

    fn push(&mut self, tokens: &[u32], trained: &[bool], document: &Document) -> Result<()> {
        let mut writer = match self.current.take() {
            Some(writer) => writer,
            None => {
                let masked = self.options.chat.is_some();
                ShardWriter::create(&self.options.folder, self.shards.len(), self.tokenizer.token_type(), masked)?
            }
        };
        writer.count(std::mem::take(&mut self.empty), std::mem::take(&mut self.chat));
        let pushed = writer.push(tokens, trained, document.text.len(), document.at);
        let full = writer.num_tokens() >= self.options.shard_tokens as u64;
        self.current = Some(writer);
        pushed?;
        self.state.documents += 1;
        self.state.tokens += tokens.len() as u64;
        if full { self.finish_shard() } else { Ok(()) }
    }

    fn finish_shard(&mut self) -> Result<()> {
        if let Some(writer) = self.current.take() {
            self.shards.push(writer.finish()?);
        }
        Ok(())
    }

    /// Says how much room is missing where the disk is full.
    fn explain(&self, error: DataError) -> DataError {
        if !error.is_disk_full() {
            return error;
        }
        let width = self.tokenizer.token_type().size_bytes() as u64;
        let finished: u64 = self.shards.iter().map(|s| s.tokens).sum();
        let lost = (self.state.tokens - finished) * width;
        let rest = self.state.bytes_total.saturating_sub(self.state.bytes_done) as f64;
        // Before anything was tokenised, a byte of text counts as half a byte of tokens.
        let per_byte = match self.state.bytes_done {
            0 => 0.5,
            done => (self.state.tokens * width) as f64 / done as f64,
        };
        let needed_bytes = lost + (rest * per_byte) as u64;
        DataError::DiskFull { folder: self.options.folder.clone(), needed_bytes }
    }
}
