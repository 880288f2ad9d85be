//! A rank that gathers units, with the other ranks' parts brought as collectives would bring them.

use zeroxide_offload::WeightHome;

use super::{Runner, peek, poke};

impl Runner<'_> {
    /// Brings the unit under its window; where the other ranks' parts are not there, as a collective would.
    pub(super) fn gather(&self, unit: usize) {
        let whole = self
            .core
            .gather(unit, self.covers(unit))
            .expect("there is room");
        // What the core says of this must be the same on all ranks, or they would not meet.
        if self.moves_weights() {
            let all = self.board.swap(self.rank, vec![u8::from(whole)]);
            assert!(
                all.iter().all(|other| *other == all[0]),
                "unit {unit}: {all:?}"
            );
        }
        if self.case.shards > 1 && self.case.weights == WeightHome::Disk {
            assert!(
                !whole,
                "unit {unit} was released: what is left of it depends on when disk requests end"
            );
        }
        if !whole {
            assert!(self.moves_weights());
            self.bring(unit);
        }
    }

    /// Gathers the unit while another is held; what the core says of it must be the same on all ranks.
    pub(super) fn gather_ahead(&self, unit: usize) {
        let found = self
            .core
            .gather_ahead(unit, self.covers(unit))
            .expect("usable");
        let all = self.board.swap(self.rank, vec![found.map_or(2, u8::from)]);
        assert!(
            all.iter().all(|other| *other == all[0]),
            "unit {unit}: {all:?}"
        );
        match found {
            Some(true) => {}
            Some(false) => self.bring(unit),
            None => panic!("there is room for three units"),
        }
    }

    /// Whether somebody may read the unit unannounced: at every other gather of it.
    fn covers(&self, unit: usize) -> bool {
        let mut seen = self.gathers.borrow_mut();
        seen[unit] += 1;
        seen[unit].is_multiple_of(2)
    }

    /// Puts the other ranks' parts where those of a held unit belong, as an all-gather would.
    fn bring(&self, unit: usize) {
        let window = self.core.window(unit).expect("a unit").expect("a window");
        let beside = self.core.beside(unit).expect("a unit");
        let (address, bytes, _anchor) = beside.unwrap_or(window);
        let (start, end) = self.core.shard(unit).expect("a unit");
        let byte = |element: u64| usize::try_from(element).expect("small") * size_of::<u16>();
        let own = peek(address + byte(start), byte(end) - byte(start));
        let all = self.board.swap(self.rank, own);
        let mut at = address;
        let first = self.rank - self.rank % self.case.shards;
        let group = first..first + self.case.shards;
        for (rank, part) in all
            .iter()
            .enumerate()
            .filter(|(rank, _)| group.contains(rank))
        {
            if rank != self.rank {
                poke(at, part);
            }
            at += part.len();
        }
        assert_eq!(at, address + bytes, "the shards are the whole");
        self.core.set_all_shards_valid(unit).expect("gathered");
    }

    /// Brings the sums that the other replicas of this rank's shard have taken.
    pub(super) fn bring_sums(&self, unit: usize) {
        let (address, bytes) = self.core.kept_gradients(unit).expect("trained");
        let replicas = self.case.replicas();
        let slice = bytes / replicas;
        let place = |replica: usize| address + slice * replica;
        let (own, shard) = (self.rank / self.case.shards, self.rank % self.case.shards);
        let all = self.board.swap(self.rank, peek(place(own), slice));
        for replica in (0..replicas).filter(|replica| *replica != own) {
            poke(place(replica), &all[replica * self.case.shards + shard]);
        }
    }
}
