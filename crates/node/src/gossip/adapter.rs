//! Until the board takes news of members.

use membership::Event;

use crate::peers::Board;

pub(super) trait Apply {
    fn apply(&self, event: &Event);
}

impl Apply for Board {
    fn apply(&self, _: &Event) {}
}
