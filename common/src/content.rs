//! A block is known by its content.
//!
//! A prompt is cut into granules of [`GRANULE_TOKENS`] tokens. Each granule has two names, both chained
//! over everything before it:
//!
//! ```text
//! root ──> granule 0 ──> granule 1 ──> ...
//!          key 0         key 1            ContentKey:   xxh3_128(parent key, tokens u32 LE, extras)
//!          digest 0      digest 1         PrefixDigest: BLAKE3(root secret, parent digest, tokens, extras)
//! ```
//!
//! The key is what is looked up and sent; it is a wire format with committed test vectors. xxh3 is not
//! collision-proof, so whoever finds an entry by key compares the digest too: a collision, in a parent
//! as well, is a miss and never someone else's KV.
//!
//! A block of `m` granules is named by its last granule. Block size is nobody's identity: a node of
//! block size 16 and one of 32 name the same content alike.

use bincode::{Decode, Encode};

use crate::model::ModelIdentity;
use crate::tokens::Token;

/// Tokens per granule, a constant of the cluster. Every node's block size is a multiple of it.
pub const GRANULE_TOKENS: usize = 16;

/// Version of the hash chain. A change of anything in this file that alters a key raises it.
pub const HASH_VERSION: u32 = 1;

/// Lookup key of a granule and of everything before it: 128 bits of xxh3.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub struct ContentKey(pub u128);

impl std::fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Keyed BLAKE3 digest of a whole prefix, compared on every hit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct PrefixDigest(pub [u8; 32]);

impl std::fmt::Debug for PrefixDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", hex(&self.0[..8]))
    }
}

/// The two names of one granule's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct ContentName {
    /// What is looked up.
    pub key: ContentKey,
    /// What is compared before a hit counts.
    pub digest: PrefixDigest,
}

/// Where a chain begins: whoever differs in any of these shares no block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainRoot {
    /// The model whose KV this is.
    pub model: ModelIdentity,
    /// Digest of the LoRA adapter's content, all zero without one.
    pub lora: [u8; 32],
    /// Tenant salt (API key or `cache_salt`), empty if all share.
    pub salt: Vec<u8>,
}

impl ChainRoot {
    /// Root of a model's chain without adapter and salt.
    pub fn of_model(model: ModelIdentity) -> Self {
        Self { model, lora: [0; 32], salt: Vec::new() }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(80 + self.salt.len());
        bytes.extend_from_slice(b"tandem content chain");
        bytes.extend_from_slice(&HASH_VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.model.0);
        bytes.extend_from_slice(&self.lora);
        bytes.extend_from_slice(&(self.salt.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&self.salt);
        bytes
    }

    /// Key that stands before the first granule.
    pub fn key(&self) -> ContentKey {
        ContentKey(xxhash_rust::xxh3::xxh3_128(&self.bytes()))
    }

    /// Digest that stands before the first granule; also the secret that keys the others.
    pub fn digest(&self) -> PrefixDigest {
        PrefixDigest(*blake3::hash(&self.bytes()).as_bytes())
    }
}

/// Names the granules of one growing token sequence.
///
/// Holds the names of all full granules and can name any prefix, the partial last granule included.
#[derive(Debug, Clone)]
pub struct ContentChain {
    secret: [u8; 32],
    root: ContentName,
    granules: Vec<ContentName>,
}

impl ContentChain {
    /// An empty chain below `root`.
    pub fn new(root: &ChainRoot) -> Self {
        let digest = root.digest();
        Self { secret: digest.0, root: ContentName { key: root.key(), digest }, granules: Vec::new() }
    }

    /// Names every granule that `tokens` fills and that has no name yet. `tokens` is the whole sequence
    /// from position 0; what was named before must not have changed.
    pub fn extend(&mut self, tokens: &[Token]) {
        for granule in tokens.chunks_exact(GRANULE_TOKENS).skip(self.granules.len()) {
            let name = self.child(self.granules.last().unwrap_or(&self.root), granule);
            self.granules.push(name);
        }
    }

    /// Names of the full granules, in order.
    pub fn granules(&self) -> &[ContentName] {
        &self.granules
    }

    /// Name of the full blocks of `block_size` tokens, in order: each that of its last granule.
    pub fn blocks(&self, block_size: usize) -> impl ExactSizeIterator<Item = ContentName> + '_ {
        let granules_per_block = block_size / GRANULE_TOKENS;
        self.granules.chunks_exact(granules_per_block).map(|block| block[block.len() - 1])
    }

    /// Digest of exactly the first `num_tokens` tokens of `tokens`, a partial granule included. Binds a
    /// KV extent to what it stands for.
    ///
    /// # Panics
    /// If `tokens` is shorter than `num_tokens`.
    pub fn digest_of_prefix(&self, tokens: &[Token], num_tokens: usize) -> PrefixDigest {
        let num_full = (num_tokens / GRANULE_TOKENS).min(self.granules.len());
        let mut name = if num_full == 0 { self.root } else { self.granules[num_full - 1] };
        for granule in tokens[num_full * GRANULE_TOKENS..num_tokens].chunks(GRANULE_TOKENS) {
            name = self.child(&name, granule);
        }
        name.digest
    }

    fn child(&self, parent: &ContentName, tokens: &[Token]) -> ContentName {
        ContentName {
            key: child_key(parent.key, tokens, &[]),
            digest: child_digest(&self.secret, parent.digest, tokens, &[]),
        }
    }
}

/// Key of the granule `tokens` below `parent`. `extras` holds digests of multimodal inputs whose
/// placeholder lies in this granule, usually none.
pub fn child_key(parent: ContentKey, tokens: &[Token], extras: &[u8]) -> ContentKey {
    let mut bytes = Vec::with_capacity(16 + tokens.len() * 4 + extras.len());
    bytes.extend_from_slice(&parent.0.to_le_bytes());
    for token in tokens {
        bytes.extend_from_slice(&token.to_le_bytes());
    }
    bytes.extend_from_slice(extras);
    ContentKey(xxhash_rust::xxh3::xxh3_128(&bytes))
}

fn child_digest(secret: &[u8; 32], parent: PrefixDigest, tokens: &[Token], extras: &[u8]) -> PrefixDigest {
    let mut hasher = blake3::Hasher::new_keyed(secret);
    hasher.update(&parent.0);
    hasher.update(&(tokens.len() as u32).to_le_bytes());
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.update(extras);
    PrefixDigest(*hasher.finalize().as_bytes())
}

/// Keys of the full granules of `tokens`, without their digests: for whoever only looks for hints.
pub fn granule_keys(root: &ChainRoot, tokens: &[Token]) -> Vec<ContentKey> {
    let mut parent = root.key();
    let keys = tokens.chunks_exact(GRANULE_TOKENS).map(|granule| {
        parent = child_key(parent, granule, &[]);
        parent
    });
    keys.collect()
}

/// Lower-case hexadecimal text of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> ChainRoot {
        ChainRoot::of_model(ModelIdentity([7; 32]))
    }

    /// Committed vectors: a change here breaks every stored and remote block and needs a new HASH_VERSION.
    #[test]
    fn keys_match_the_committed_vectors() {
        assert_eq!(HASH_VERSION, 1);
        let tokens: Vec<Token> = (0..32).collect();
        let mut chain = ContentChain::new(&root());
        chain.extend(&tokens);
        let got: Vec<String> = std::iter::once(format!("{:?}", root().key()))
            .chain(chain.granules().iter().map(|n| format!("{:?} {}", n.key, hex(&n.digest.0))))
            .collect();
        let expected = include_str!("content_vectors.txt").lines().collect::<Vec<_>>();
        assert_eq!(got, expected);
    }

    #[test]
    fn growing_gives_the_same_names_as_all_at_once() {
        let tokens: Vec<Token> = (0..100).map(|t| t * 7 % 50).collect();
        let mut whole = ContentChain::new(&root());
        whole.extend(&tokens);
        let mut grown = ContentChain::new(&root());
        for end in 0..=tokens.len() {
            grown.extend(&tokens[..end]);
        }
        assert_eq!(whole.granules(), grown.granules());
        let keys: Vec<_> = whole.granules().iter().map(|name| name.key).collect();
        assert_eq!(granule_keys(&root(), &tokens), keys);
        assert_eq!(whole.granules().len(), 6);
        assert_eq!(
            whole.blocks(32).collect::<Vec<_>>(),
            [whole.granules()[1], whole.granules()[3], whole.granules()[5]]
        );
    }

    #[test]
    fn salt_adapter_and_model_separate_chains() {
        let tokens = vec![1; 16];
        let mut roots = vec![root(), ChainRoot::of_model(ModelIdentity([8; 32]))];
        roots.push(ChainRoot { salt: b"tenant".to_vec(), ..root() });
        roots.push(ChainRoot { lora: [1; 32], ..root() });
        let names: std::collections::HashSet<_> = roots
            .iter()
            .map(|root| {
                let mut chain = ContentChain::new(root);
                chain.extend(&tokens);
                chain.granules()[0]
            })
            .collect();
        assert_eq!(names.len(), roots.len());
    }

    #[test]
    fn prefix_digest_tells_partial_granules_apart() {
        let tokens: Vec<Token> = (0..40).collect();
        let mut chain = ContentChain::new(&root());
        chain.extend(&tokens);
        assert_eq!(chain.digest_of_prefix(&tokens, 32), chain.granules()[1].digest);
        let digests: std::collections::HashSet<_> = (0..=40).map(|n| chain.digest_of_prefix(&tokens, n)).collect();
        assert_eq!(digests.len(), 41);
        let mut other = tokens.clone();
        other[39] = 0;
        assert_ne!(chain.digest_of_prefix(&tokens, 40), chain.digest_of_prefix(&other, 40));
    }
}
