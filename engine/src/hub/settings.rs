//! Where the cache is, which server is asked, with which token: the environment of `huggingface_hub`.

use std::fmt;
use std::path::PathBuf;

/// Settings of Hub access.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// Folder of `models--org--name` folders.
    pub cache: PathBuf,
    /// Server, without a slash at the end.
    pub endpoint: String,
    /// Sent to the server, and to no other host that it redirects to.
    pub token: Option<String>,
    /// Ask nobody; use what is cached.
    pub is_offline: bool,
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "<hidden>"))
            .field("is_offline", &self.is_offline)
            .finish()
    }
}

impl HubSettings {
    /// From the environment of the process.
    pub fn from_env() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// From variables that `lookup` knows: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HOME`, `HF_ENDPOINT`,
    /// `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`. Empty is the same as unset. Without `HF_TOKEN` the file
    /// that `hf auth login` writes is read.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let lookup = |name: &str| lookup(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty());
        let path = |name: &str| lookup(name).map(PathBuf::from);
        let user_cache = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
        let home = path("HF_HOME").unwrap_or_else(|| user_cache.unwrap_or_else(|| ".cache".into()).join("huggingface"));
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let saved_token = || std::fs::read_to_string(token_path).ok().map(|token| token.trim().to_string());
        Self {
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            endpoint: lookup("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".to_string(), |url| url.trim_end_matches('/').to_string()),
            token: lookup("HF_TOKEN").or_else(saved_token).filter(|token| !token.is_empty()),
            is_offline: lookup("HF_HUB_OFFLINE")
                .is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())),
        }
    }
}
