//! Who owns which block of keys and values: counts of references, no tensors.
//!
//! Invariants: a block is free or in as many tables as its count says; nobody writes to a block that is in two tables
//! ([`BlockManager::extend`] gives the writer a copy first); an operation that fails changes nothing.

use tangelo_kernels::op::attention::paged::BLOCK_TOKENS;

/// A block's contents to be copied before the step's tokens are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// From.
    pub from: u32,
    /// To.
    pub to: u32,
}

/// Not as many blocks are free as are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBlocks;

/// The blocks of one engine.
#[derive(Clone, Debug)]
pub struct BlockManager {
    ref_counts: Vec<u32>,
    /// Free blocks; the last is taken first.
    free: Vec<u32>,
}

/// Blocks that hold `num_tokens`.
pub fn blocks_for(num_tokens: usize) -> usize {
    num_tokens.div_ceil(BLOCK_TOKENS)
}

impl BlockManager {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> BlockManager {
        BlockManager { ref_counts: vec![0; num_blocks], free: (0..num_blocks as u32).rev().collect() }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    /// Blocks in no table.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// How many tables a block is in.
    pub fn references(&self, block: u32) -> u32 {
        self.ref_counts[block as usize]
    }

    /// Makes room in `table`, whose first `start` tokens are written, for tokens up to `end`; the last block is copied if
    /// others read it.
    pub fn extend(&mut self, table: &mut Vec<u32>, start: usize, end: usize) -> Result<Option<BlockCopy>, OutOfBlocks> {
        debug_assert!(blocks_for(start) <= table.len() && start <= end);
        let partial = start / BLOCK_TOKENS;
        let writes_behind = start < end && !start.is_multiple_of(BLOCK_TOKENS);
        let shared = writes_behind && self.references(table[partial]) > 1;
        let added = blocks_for(end).saturating_sub(table.len());
        if added + usize::from(shared) > self.free.len() {
            return Err(OutOfBlocks);
        }
        let copy = shared.then(|| {
            let copy = BlockCopy { from: table[partial], to: self.take() };
            self.ref_counts[copy.from as usize] -= 1;
            table[partial] = copy.to;
            copy
        });
        table.extend((0..added).map(|_| self.take()));
        Ok(copy)
    }

    /// Another table of the same blocks.
    pub fn fork(&mut self, table: &[u32]) -> Vec<u32> {
        for &block in table {
            self.ref_counts[block as usize] += 1;
        }
        table.to_vec()
    }

    /// Gives the blocks of a table back.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for block in table.drain(..).rev() {
            let count = &mut self.ref_counts[block as usize];
            assert!(*count > 0, "block {block} was given back twice");
            *count -= 1;
            if *count == 0 {
                self.free.push(block);
            }
        }
    }

    fn take(&mut self) -> u32 {
        let block = self.free.pop().expect("the number of free blocks was checked");
        self.ref_counts[block as usize] = 1;
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[derive(Clone, Copy, Debug)]
    enum Action {
        Start,
        Grow { which: usize, tokens: usize },
        Fork { which: usize },
        Release { which: usize },
    }

    fn actions() -> impl Strategy<Value = Vec<Action>> {
        let one = prop_oneof![
            Just(Action::Start),
            (0..100usize, 1..200usize).prop_map(|(which, tokens)| Action::Grow { which, tokens }),
            (0..100usize).prop_map(|which| Action::Fork { which }),
            (0..100usize).prop_map(|which| Action::Release { which }),
        ];
        prop::collection::vec(one, 1..200)
    }

    /// Tables with the tokens written to each; `contents` says what lies in a block: who wrote each of its tokens.
    #[derive(Default)]
    struct World {
        tables: Vec<(Vec<u32>, Vec<u64>)>,
        contents: HashMap<u32, Vec<u64>>,
        next: u64,
    }

    impl World {
        fn grow(&mut self, manager: &mut BlockManager, which: usize, tokens: usize) {
            let (table, written) = &mut self.tables[which];
            let before = (table.clone(), manager.num_free());
            let Ok(copy) = manager.extend(table, written.len(), written.len() + tokens) else {
                assert_eq!((table.clone(), manager.num_free()), before, "a failure changed something");
                return;
            };
            if let Some(copy) = copy {
                let copied = self.contents[&copy.from].clone();
                self.contents.insert(copy.to, copied);
            }
            for _ in 0..tokens {
                let (block, slot) = (table[written.len() / BLOCK_TOKENS], written.len() % BLOCK_TOKENS);
                assert_eq!(manager.references(block), 1, "block {block} is shared and written");
                let content = self.contents.entry(block).or_default();
                content.truncate(slot);
                content.push(self.next);
                written.push(self.next);
                self.next += 1;
            }
        }

        fn check(&self, manager: &BlockManager) {
            let mut counts = vec![0; manager.num_blocks()];
            for (table, written) in &self.tables {
                assert_eq!(table.len(), blocks_for(written.len()));
                table.iter().for_each(|&b| counts[b as usize] += 1);
                let read: Vec<u64> = table.iter().flat_map(|b| self.contents[b].iter().copied()).collect();
                assert_eq!(&read[..written.len()], &written[..], "a table reads what others wrote");
            }
            assert!(counts.iter().enumerate().all(|(b, &n)| manager.references(b as u32) == n), "{counts:?}");
            assert_eq!(manager.num_free(), counts.iter().filter(|&&n| n == 0).count());
        }
    }

    proptest! {
        #[test]
        fn every_table_keeps_its_own_tokens(actions in actions(), num_blocks in 1..40usize) {
            let mut manager = BlockManager::new(num_blocks);
            let mut world = World::default();
            for action in actions {
                let count = world.tables.len();
                match action {
                    Action::Start => world.tables.push((Vec::new(), Vec::new())),
                    _ if count == 0 => {}
                    Action::Grow { which, tokens } => world.grow(&mut manager, which % count, tokens),
                    Action::Fork { which } => {
                        let (table, written) = &world.tables[which % count];
                        let fork = (manager.fork(table), written.clone());
                        world.tables.push(fork);
                    }
                    Action::Release { which } => {
                        let (mut table, _) = world.tables.swap_remove(which % count);
                        manager.release(&mut table);
                    }
                }
                world.check(&manager);
            }
        }
    }

    #[test]
    fn the_last_reader_of_a_shared_block_writes_in_place() {
        let mut manager = BlockManager::new(3);
        let mut first = Vec::new();
        assert_eq!(manager.extend(&mut first, 0, 70), Ok(None));
        let mut second = manager.fork(&first);
        let copy = manager.extend(&mut first, 70, 71).unwrap().expect("the partial block is shared");
        assert_eq!((copy.from, copy.to), (second[1], first[1]));
        assert_eq!(manager.extend(&mut second, 70, 71), Ok(None));
        assert_eq!(manager.extend(&mut second, 71, 129), Err(OutOfBlocks));
    }
}
