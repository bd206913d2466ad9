// Who is signed in, and what that allows. The gateway decides; this only keeps buttons away that it would refuse.
const RANKS = { reader: 1, operator: 2, owner: 3 };
let current = null;

export const setSession = (session) => { current = session; };
export const session = () => current;

/** Whether whoever is signed in may do what a "reader", an "operator" or an "owner" may. */
export const may = (role) => (RANKS[current?.role] ?? 0) >= RANKS[role];
