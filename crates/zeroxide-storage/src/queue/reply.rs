//! Where completions go, and who is told that they have come.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::notify::Notify;
use super::operation::Completion;

/// The way from a queue to whoever takes its completions.
#[derive(Clone)]
pub struct Reply {
    channel: Sender<Completion>,
    notify: Option<Arc<Notify>>,
}

impl Reply {
    /// Tells `notify` of every completion: for a thread that has more to look at than the channel.
    pub const fn notifying(channel: Sender<Completion>, notify: Arc<Notify>) -> Self {
        Self {
            channel,
            notify: Some(notify),
        }
    }

    /// Sends the completion. A receiver that is gone wants none; the buffer then goes back to where it came from.
    pub(super) fn send(&self, completion: Completion) {
        let _ = self.channel.send(completion);
        if let Some(notify) = &self.notify {
            notify.notify_one();
        }
    }
}

impl From<Sender<Completion>> for Reply {
    fn from(channel: Sender<Completion>) -> Self {
        Self {
            channel,
            notify: None,
        }
    }
}

impl From<&Sender<Completion>> for Reply {
    fn from(channel: &Sender<Completion>) -> Self {
        Self::from(channel.clone())
    }
}

impl From<&Reply> for Reply {
    fn from(reply: &Reply) -> Self {
        reply.clone()
    }
}
