/** Two windows have one conversation: what is said in either comes together. */

/** Whether two turns are one, of which either may have more answers. */
const isSame = (one, other) => one.role === other.role && one.versions[0] === other.versions[0];

const isEqual = (one, other) => one.shown === other.shown && isSame(one, other) && !missing(one, other).length;

const missing = (own, other) => other.versions.filter((version) => !own.versions.includes(version));

/** Turns as another window has them; those that are this one's too stay the objects they were. */
export const withOwn = (turns, own) =>
  turns.map((turn, index) => (own[index] && isEqual(turn, own[index]) && isEqual(own[index], turn) ? own[index] : turn));

/** This window's turns, with the answers and the turns that only the other has. */
export function joined(own, others) {
  const parts = own.findIndex((turn, index) => !others[index] || !isSame(turn, others[index]));
  const common = parts < 0 ? own.length : parts;
  for (const [index, turn] of own.slice(0, common).entries()) turn.versions.push(...missing(turn, others[index]));
  return [...own, ...others.slice(common)];
}
