//! The table of nodes that are linked, and what is made of it: the router's view and the directory of
//! prefill nodes for the decode nodes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::ids::{NodeId, Role};
use common::model::ModelInfo;
use common::wire::{Directory, Hello, NodeState, NodeStatus, Peer};
use kv_connector::Link;
use tokio::sync::watch;

use crate::route::{ClusterView, NodeLife, NodeView, OthersWork, OwnWork, Stay};

/// Why a node is not taken, in words for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It says nothing of a model.
    #[error("node \"{0}\" announces no model: it is not a node of this version")]
    NoModel(NodeId),
    /// Another model than the cluster's.
    #[error("node \"{node}\" does not fit the cluster: {reason}")]
    OtherModel {
        /// Which.
        node: NodeId,
        /// Both values.
        reason: String,
    },
    /// A vocabulary that the proxy's tokenizer does not fit.
    #[error(
        "node \"{node}\" has a vocabulary of {theirs} tokens, this proxy's tokenizer knows {ours}: start both with \
         the same --model"
    )]
    OtherVocabulary {
        /// Which.
        node: NodeId,
        /// Its logits' width.
        theirs: u32,
        /// Largest token id and one.
        ours: u32,
    },
}

/// Tokens that a tokenizer may know beyond the model's vocabulary: marks that some checkpoints add without
/// giving them a row. A prompt that has one is refused.
const ADDED_TOKENS_MAX: u32 = 256;

/// The nodes that are linked now.
#[derive(Debug)]
pub struct Members {
    table: Mutex<Table>,
    view: Mutex<Arc<ClusterView>>,
    directory: watch::Sender<Directory>,
    num_ready: watch::Sender<(usize, usize)>,
    tokenizer_vocab_size: u32,
}

#[derive(Debug, Default)]
struct Table {
    members: HashMap<NodeLife, Member>,
    /// What the cluster serves: the first node decided. Forgotten when the last one is gone.
    model: Option<ModelInfo>,
    num_stays: u64,
}

#[derive(Debug)]
struct Member {
    hello: Hello,
    addr: SocketAddr,
    link: Option<Link>,
    status: NodeStatus,
    is_stuck: bool,
    stay: Stay,
    others: OthersWork,
    own: Arc<OwnWork>,
}

impl Members {
    /// Nobody yet. `tokenizer_vocab_size` is what nodes' vocabularies are held against.
    pub fn new(tokenizer_vocab_size: u32) -> Self {
        Self {
            table: Mutex::default(),
            view: Mutex::default(),
            directory: watch::Sender::new(Directory { prefill_nodes: Vec::new() }),
            num_ready: watch::Sender::new((0, 0)),
            tokenizer_vocab_size,
        }
    }

    /// Whether a node that said this may join.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn check(&self, hello: &Hello) -> Result<(), Refused> {
        let node = hello.node.clone();
        let Some(model) = &hello.model else { return Err(Refused::NoModel(node)) };
        if model.vocab_size.saturating_add(ADDED_TOKENS_MAX) < self.tokenizer_vocab_size {
            let (theirs, ours) = (model.vocab_size, self.tokenizer_vocab_size);
            return Err(Refused::OtherVocabulary { node, theirs, ours });
        }
        match &lock(&self.table).model {
            Some(cluster) => cluster
                .check_compatible(model)
                .map_err(|mismatch| Refused::OtherModel { node, reason: mismatch.to_string() }),
            None => Ok(()),
        }
    }

    /// What a node told. The first word of a node makes it a member, if it still fits.
    ///
    /// # Errors
    /// [`Refused`], if another model was there first.
    pub fn on_status(
        &self,
        hello: &Hello,
        addr: SocketAddr,
        link: Option<&Link>,
        status: NodeStatus,
        is_stuck: bool,
    ) -> Result<(), Refused> {
        self.check(hello)?;
        let mut table = lock(&self.table);
        if table.model.is_none() {
            table.model.clone_from(&hello.model);
            if hello.model.as_ref().is_some_and(|model| model.numerics.is_simulated()) {
                tracing::warn!(node = %hello.node, "the nodes simulate a model (--device sim): answers mean nothing");
            }
        }
        let life = (hello.node.clone(), hello.epoch);
        let known = table.members.get(&life).map(|member| (member.stay, member.own.clone()));
        let (stay, own) = known.unwrap_or_else(|| {
            table.num_stays += 1;
            (Stay(table.num_stays), Arc::default())
        });
        let others = OthersWork::of(&status.load, &own);
        let (hello, link) = (hello.clone(), link.cloned());
        let member = Member { hello, addr, link, status, is_stuck, stay, others, own };
        table.members.insert(life, member);
        self.publish(&table);
        Ok(())
    }

    /// The node is gone.
    pub fn on_gone(&self, life: &NodeLife) {
        let mut table = lock(&self.table);
        if table.members.remove(life).is_none() {
            return;
        }
        if table.members.is_empty() {
            table.model = None;
        }
        self.publish(&table);
    }

    /// The nodes that are ready.
    pub fn view(&self) -> Arc<ClusterView> {
        lock(&self.view).clone()
    }

    /// Prefill nodes that are ready, for the decode nodes.
    pub fn directory(&self) -> watch::Receiver<Directory> {
        self.directory.subscribe()
    }

    /// How many decode and prefill nodes are ready.
    pub fn num_ready(&self) -> watch::Receiver<(usize, usize)> {
        self.num_ready.subscribe()
    }

    /// The link to a node in this life.
    pub fn link(&self, life: &NodeLife) -> Option<Link> {
        lock(&self.table).members.get(life)?.link.clone()
    }

    fn publish(&self, table: &Table) {
        let mut view = ClusterView::default();
        let mut directory = Directory { prefill_nodes: Vec::new() };
        let mut max_model_len = u32::MAX;
        let mut members: Vec<(&NodeLife, &Member)> = table.members.iter().collect();
        members.sort_by_key(|(life, _)| *life);
        for (life, member) in members {
            if member.is_stuck {
                continue;
            }
            let node = NodeView {
                node: life.0.clone(),
                epoch: life.1,
                stay: member.stay,
                load: member.status.load,
                others: member.others,
                own: member.own.clone(),
            };
            let is_ready = member.status.state == NodeState::Ready;
            match member.hello.role {
                Role::PrefillNode if !is_ready => view.draining_prefill.push(node),
                _ if !is_ready => {}
                Role::DecodeNode => {
                    let len_max = member.hello.model.as_ref().map_or(u32::MAX, |model| model.max_model_len);
                    max_model_len = max_model_len.min(len_max);
                    view.decode.push(node);
                }
                Role::PrefillNode => {
                    directory.prefill_nodes.push(Peer { node: life.0.clone(), control: member.addr });
                    view.prefill.push(node);
                }
                Role::Proxy => {}
            }
        }
        view.model = table.model.clone().filter(|_| !view.decode.is_empty());
        if let Some(model) = &mut view.model {
            model.max_model_len = max_model_len;
        }
        let num_ready = (view.decode.len(), view.prefill.len());
        *lock(&self.view) = Arc::new(view);
        self.directory.send_if_modified(|known| {
            let is_new = *known != directory;
            *known = directory;
            is_new
        });
        self.num_ready.send_if_modified(|known| std::mem::replace(known, num_ready) != num_ready);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every statement leaves the table valid.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dispatch::fake::tiny_model_info;
    use common::ids::Epoch;
    use common::wire::NodeLoad;

    fn hello(name: &str, role: Role, epoch: u64) -> Hello {
        let node = NodeId::new(name).unwrap();
        Hello { node, role, epoch: Epoch(epoch), model: Some(tiny_model_info()), bulk_port: None }
    }

    fn tell(members: &Members, hello: &Hello, state: NodeState) -> Result<(), Refused> {
        let status = NodeStatus { state, load: NodeLoad::default() };
        members.on_status(hello, ([127, 0, 0, 1], 9).into(), None, status, false)
    }

    #[test]
    fn draining_or_gone_nodes_leave_the_view_and_the_directory() {
        let members = Members::new(512);
        let (decode, prefill) = (hello("d", Role::DecodeNode, 1), hello("p", Role::PrefillNode, 2));
        tell(&members, &decode, NodeState::Ready).unwrap();
        tell(&members, &prefill, NodeState::Ready).unwrap();
        assert_eq!((members.view().decode.len(), members.view().prefill.len()), (1, 1));
        assert_eq!(members.directory().borrow().prefill_nodes[0].node.as_str(), "p");
        tell(&members, &prefill, NodeState::Draining).unwrap();
        assert!(members.view().prefill.is_empty() && members.directory().borrow().prefill_nodes.is_empty());
        assert_eq!(members.view().draining_prefill[0].node.as_str(), "p", "it can still be asked for what it holds");
        members.on_gone(&(decode.node.clone(), Epoch(9)));
        assert_eq!(members.view().decode.len(), 1, "another life of the node is not this one");
        members.on_gone(&(decode.node.clone(), decode.epoch));
        assert!(members.view().decode.is_empty() && members.view().model.is_none());
    }

    #[test]
    fn a_node_that_was_gone_is_back_for_another_stay() {
        let members = Members::new(512);
        let stay = |members: &Members| members.view().decode[0].stay;
        let node = hello("d", Role::DecodeNode, 1);
        tell(&members, &node, NodeState::Ready).unwrap();
        let first = stay(&members);
        tell(&members, &node, NodeState::Ready).unwrap();
        assert_eq!(stay(&members), first, "it was there all the time");
        members.on_gone(&(node.node.clone(), node.epoch));
        tell(&members, &node, NodeState::Ready).unwrap();
        assert_ne!(stay(&members), first);
    }

    #[test]
    fn first_node_decides_the_model_until_the_last_is_gone() {
        let members = Members::new(512);
        let first = hello("a", Role::DecodeNode, 1);
        let mut other = hello("b", Role::DecodeNode, 1);
        other.model.as_mut().unwrap().identity.0[0] ^= 1;
        tell(&members, &first, NodeState::Ready).unwrap();
        let refused = members.check(&other).unwrap_err();
        assert!(refused.to_string().contains("\"b\"") && refused.to_string().contains("serves model"), "{refused}");
        members.on_gone(&(first.node.clone(), first.epoch));
        members.check(&other).unwrap();
    }

    #[test]
    fn nodes_without_model_or_with_a_smaller_vocabulary_are_refused() {
        let members = Members::new(1000);
        let mut node = hello("a", Role::DecodeNode, 1);
        assert!(matches!(members.check(&node), Err(Refused::OtherVocabulary { theirs: 512, ours: 1000, .. })));
        node.model = None;
        assert!(matches!(members.check(&node), Err(Refused::NoModel(_))));
    }

    #[test]
    fn shortest_decode_node_limits_the_length() {
        let members = Members::new(512);
        let mut short = hello("b", Role::DecodeNode, 1);
        short.model.as_mut().unwrap().max_model_len = 100;
        tell(&members, &hello("a", Role::DecodeNode, 1), NodeState::Ready).unwrap();
        tell(&members, &short, NodeState::Ready).unwrap();
        assert_eq!(members.view().model.as_ref().unwrap().max_model_len, 100);
        tell(&members, &short, NodeState::Draining).unwrap();
        assert_eq!(members.view().model.as_ref().unwrap().max_model_len, 4096);
    }
}
