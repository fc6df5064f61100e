//! Where connections are kept: a slab with generations, so that a late event or deadline for
//! a connection that is gone meets nothing, and an index by key.

use std::collections::HashMap;

use super::connection::{Connection, Key};

/// Names a connection for as long as it lives, and nothing after.
pub(super) type Token = u64;

#[derive(Debug, Default)]
struct Entry {
    generation: u32,
    connection: Option<Connection>,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
    by_key: HashMap<Key, Token>,
}

fn index(token: Token) -> usize {
    (token & 0xffff_ffff) as usize
}

impl Table {
    /// Connections in all.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Adds a connection that the guest does not know by a key yet.
    pub(super) fn insert(&mut self, connection: Connection) -> Token {
        let at = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry::default());
            // The muxer keeps far fewer than 2^32 connections.
            u32::try_from(self.entries.len() - 1).unwrap_or(u32::MAX)
        });
        let entry = &mut self.entries[at as usize];
        entry.connection = Some(connection);
        u64::from(entry.generation) << 32 | u64::from(at)
    }

    /// Makes a connection known by its key.
    pub(super) fn name(&mut self, token: Token, key: Key) {
        self.by_key.insert(key, token);
    }

    /// Takes its key from a connection, for the guest may use it anew.
    pub(super) fn unname(&mut self, token: Token, key: Key) {
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
    }

    pub(super) fn find(&self, key: Key) -> Option<Token> {
        self.by_key.get(&key).copied()
    }

    pub(super) fn get(&mut self, token: Token) -> Option<&mut Connection> {
        let entry = self.entries.get_mut(index(token))?;
        if u64::from(entry.generation) != token >> 32 {
            return None;
        }
        entry.connection.as_mut()
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Connection> {
        self.get(token)?;
        let entry = self.entries.get_mut(index(token))?;
        let connection = entry.connection.take()?;
        entry.generation = entry.generation.wrapping_add(1) & 0x7fff_ffff;
        self.free.push(u32::try_from(index(token)).unwrap_or(u32::MAX));
        self.unname(token, connection.key);
        Some(connection)
    }

    /// Tokens of all connections.
    pub(super) fn tokens(&self) -> Vec<Token> {
        let live = self.entries.iter().enumerate().filter(|(_, entry)| entry.connection.is_some());
        live.map(|(at, entry)| u64::from(entry.generation) << 32 | at as u64).collect()
    }
}
