//! Whether so much is lost that more was on the way than the path takes.

/// Of what was sent, more than this; less is what links lose by chance.
const SHARE: f64 = 0.02;
/// Fewer may be chance where few are on the way: of 200 datagrams at 0.1 %, five are lost once in 400,000 times.
const NUM_DATAGRAMS: u64 = 5;
/// Rounds are looked at together until they have this many.
const NUM_DATAGRAMS_ENOUGH: u64 = 200;

/// What became of the datagrams of one or several rounds.
#[derive(Debug, Clone, Default)]
pub(super) struct Losses {
    delivered_bytes: u64,
    lost_bytes: u64,
    is_marked: bool,
}

/// How it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TooMuch {
    /// By losses.
    Lost,
    /// A queue on the path says so (ECN).
    Marked,
}

impl Losses {
    pub(super) fn on_delivered(&mut self, num_bytes: u64) {
        self.delivered_bytes += num_bytes;
    }

    /// Lost, or marked by a queue: no bytes then.
    pub(super) fn on_lost(&mut self, num_bytes: u64) {
        self.lost_bytes += num_bytes;
        self.is_marked |= num_bytes == 0;
    }

    /// A round ends. Once it says something, what comes next is looked at by itself.
    pub(super) fn end_round(&mut self, datagram_bytes: u64) -> Option<TooMuch> {
        let sent_bytes = self.delivered_bytes + self.lost_bytes;
        let is_lost =
            self.lost_bytes >= NUM_DATAGRAMS * datagram_bytes && self.lost_bytes as f64 > SHARE * sent_bytes as f64;
        let too_much = if is_lost { Some(TooMuch::Lost) } else { self.is_marked.then_some(TooMuch::Marked) };
        if too_much.is_some() || sent_bytes >= NUM_DATAGRAMS_ENOUGH * datagram_bytes {
            *self = Self::default();
        }
        too_much
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What rounds with so many delivered and lost say.
    fn rounds(of: &[(u64, u64)]) -> Vec<Option<TooMuch>> {
        let mut losses = Losses::default();
        let mut end = |(num_delivered, num_lost)| {
            losses.on_delivered(num_delivered * 1000);
            (0..num_lost).for_each(|_| losses.on_lost(1000));
            losses.end_round(1000)
        };
        of.iter().map(|round| end(*round)).collect()
    }

    #[test]
    fn losses_of_few_are_chance_until_they_come_again() {
        assert_eq!(rounds(&[(11, 3), (11, 3)]), [None, Some(TooMuch::Lost)]);
        assert_eq!(rounds(&[(96, 4), (96, 1)]), [None, Some(TooMuch::Lost)]);
        assert_eq!(rounds(&[(196, 4), (196, 4)]), [None, None]);
        assert_eq!(rounds(&[(1000, 20), (970, 30)]), [None, Some(TooMuch::Lost)]);
        assert_eq!(rounds(&[(1000, 30), (1000, 0)]), [Some(TooMuch::Lost), None]);
    }

    #[test]
    fn one_mark_is_enough() {
        let mut losses = Losses::default();
        losses.on_delivered(100_000);
        losses.on_lost(0);
        assert_eq!((losses.end_round(1000), losses.end_round(1000)), (Some(TooMuch::Marked), None));
    }
}
